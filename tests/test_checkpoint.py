"""A sharded checkpoint converted on the disk: the bits of the conversion in memory, and what is beside the weights."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sqa_fx
from sqa_fx import checkpoint as checkpoint_module
from sqa_fx import checkpoint_weights, cli_checkpoint
from sqa_fx.checkpoint_cut import Source, TensorCut
from sqa_fx.checkpoint_format import read_header
from sqa_fx.checkpoint_plan import planned
from sqa_fx.cli import main
from sqa_fx.errors import InputError, MissingError, PlanError
from sqa_fx.passes.parameters import cut_tensor
from sqa_fx.passes.rotation import rotated
from sqa_fx.plan import HeadBlock, ParameterPlan, Plan, Rotation

LAYERS = 2
IDS = torch.ones(2, 5, dtype=torch.int64)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=6,
        vocab_size=97,
        architectures=["LlamaForCausalLM"],  # as save_pretrained writes it, which not every test has run before
    )
    made: nn.Module = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    return made


@pytest.fixture(scope="module")
def converted(model: nn.Module) -> Any:
    return sqa_fx.convert(model, hq=4, hkv=2, dynamic_shapes=None)


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "in"
    model.save_pretrained(folder, max_shard_size="25KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "assets").mkdir()
    (folder / "assets" / "readme.txt").write_text("hello")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    return folder


@pytest.fixture(autouse=True)
def _no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """How results load is the matter of test_huggingface_checkpoint.py."""
    for module in (checkpoint_module, cli_checkpoint):
        monkeypatch.setattr(module, "loading_finish", lambda *_: None)


@pytest.fixture
def result(checkpoint: Path, converted: Any, tmp_path: Path) -> Path:
    sqa_fx.convert_checkpoint(checkpoint, tmp_path / "out", plan=converted.plan, jobs=2)
    return tmp_path / "out"


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("model"):
            found |= load_file(path)
    return found


def test_the_bits_of_a_conversion_in_memory(
    checkpoint: Path, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    streamed = checkpoint_weights._streamed

    def counted(source: Source, entry: Any, axis: int) -> Tensor:
        read.append(entry.name)
        return streamed(source, entry, axis)

    monkeypatch.setattr(checkpoint_weights, "_streamed", counted)
    monkeypatch.setattr(checkpoint_weights, "CHUNK", 700)
    report = sqa_fx.convert_checkpoint(checkpoint, tmp_path / "out", hq=4, hkv=2, jobs=2, dynamic_shapes=None)
    names = [f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(LAYERS) for name in "vo"]
    assert sorted(read) == sorted(names), "each is read once"
    assert report.plan.sites == converted.plan.sites and report.plan.same_cuts(converted.plan)
    state, made = converted.state_dict(), tensors(tmp_path / "out")
    assert set(made) <= set(state) and len(made) == report.tensors
    for name, tensor in made.items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    assert report.tensors_cut == 4 * LAYERS and report.shards == len(list(checkpoint.glob("model-*"))) > 3
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in made.values()) < report.bytes_before
    assert "sites" in report.to_json() and "8/4 -> 4/2" in report.table()


def test_everything_beside_the_weights(checkpoint: Path, result: Path) -> None:
    for name in ("config.json", "tokenizer.json", "assets/readme.txt", "generation_config.json"):
        assert (result / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not (result / "pytorch_model.bin").exists() and not (result / ".cache").exists()
    assert not result.with_name("out.partial").exists()
    index, before = (json.loads((f / "model.safetensors.index.json").read_bytes()) for f in (result, checkpoint))
    assert index["weight_map"] == before["weight_map"]
    made = tensors(result)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in made.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in made.values())
    with safe_open(next(result.glob("model-*")), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert Plan.load(result / "sqa_fx_plan.json").sites
    files = sqa_fx.verify_checkpoint(result)
    assert {"config.json", "assets/readme.txt", "sqa_fx_plan.json"} < set(files)


def test_a_single_file_and_a_hook(model: Any, converted: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "in")
    seen: list[Path] = []

    def finished(folder: Path) -> None:
        assert (folder / "model.safetensors").exists() and (folder / "config.json").exists()
        seen.append(folder)
        (folder / "config.json").write_text('{"changed": true}')

    @contextlib.contextmanager
    def finish(plan: Plan) -> Iterator[Callable[[Path], None]]:
        assert plan.same_cuts(converted.plan) and not progress, "before a byte is written"
        yield finished
        assert seen and not (tmp_path / "out").exists(), "before it is published"

    progress: list[tuple[int, int]] = []
    report = sqa_fx.convert_checkpoint(
        tmp_path / "in",
        tmp_path / "out",
        plan=converted.plan,
        finish=finish,
        on_bytes=lambda done, of: progress.append((done, of)),
    )
    assert (tmp_path / "out" / "config.json").read_text() == '{"changed": true}'
    assert not any("config.json" in note for note in report.notes)
    assert seen[0].name == "out.partial" and progress[-1][0] == progress[-1][1]
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    state = converted.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in tensors(tmp_path / "out").items())
    sqa_fx.verify_checkpoint(tmp_path / "out")


def test_again_on_a_complete_directory(checkpoint: Path, converted: Any, result: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in result.rglob("*")}
    again = sqa_fx.convert_checkpoint(checkpoint, result, plan=converted.plan)
    assert again.shards_kept == again.shards
    assert {path: path.stat().st_mtime_ns for path in result.rglob("*")} == before
    other = sqa_fx.Plan(converted.plan.sites[:1], converted.plan.parameters[:4])
    with pytest.raises(InputError, match="exists"):
        sqa_fx.convert_checkpoint(checkpoint, result, plan=other)
    sqa_fx.convert_checkpoint(checkpoint, result, plan=other, overwrite=True)
    assert len(Plan.load(result / "sqa_fx_plan.json").sites) == 1
    assert os.listdir(result.parent) == ["out"]


def test_plan_of_a_config_alone(model: Any, tmp_path: Path, converted: Any) -> None:
    model.config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no weights here"):
        made = sqa_fx.plan(tmp_path, hq=4, hkv=2, dynamic_shapes=None)
    with torch.device("meta"):
        bare = type(model)(model.config)
    assert sqa_fx.plan(bare.eval(), hq=4, hkv=2, heads="first", dynamic_shapes=None).same_cuts(made)
    assert [site.heads_by for site in made.sites] == ["first"] * LAYERS
    assert {p.name for p in made.parameters} == {p.name for p in converted.plan.parameters}
    for site in made.sites:
        assert site.query_heads == (0, 1, 4, 5) and site.kv_groups == ((0,), (2,))
    with pytest.raises(InputError, match="needs weights"):
        sqa_fx.plan(tmp_path, hq=4, heads="weights")


def test_plan_of_modules(model: Any, converted: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    made = sqa_fx.plan(model, hq=4, hkv=2, kwargs={"input_ids": IDS}, dynamic_shapes=None)
    assert made.sites == converted.plan.sites and made.same_cuts(converted.plan)
    assert not any(p.is_meta for p in model.parameters())
    with FakeTensorMode():
        fake = type(model)(model.config).eval()
    assert len(sqa_fx.plan(fake, hq=4, hkv=2, heads="first", dynamic_shapes=None).sites) == LAYERS
    with pytest.raises(InputError, match="says nothing of its inputs"):
        sqa_fx.plan(nn.Linear(3, 3), hq=1)


class Shared(nn.Module):
    """One attention block under two names, with its query heads in a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.first(x))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.register_buffer("slopes", torch.arange(1.0, 5.0).view(4, 1, 1), persistent=False)
        self.slopes: Tensor

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
        away = torch.arange(x.shape[1], device=x.device)
        bias = -(away[:, None] - away).abs() * self.slopes
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        o: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return o


def test_tied_names_and_what_is_not_stored(tmp_path: Path) -> None:
    from sqa_fx.checkpoint import convert_files

    module, x = Shared(), torch.randn(2, 5, 24)
    converted = sqa_fx.convert(module, hq=2, hkv=2, args=(x,), dynamic_shapes=None)
    (tmp_path / "in").mkdir()
    # The names of the second place, under a prefix, as another library may store them.
    save_file({f"net.again.{n}": t.clone() for n, t in module.again.state_dict().items()},
              tmp_path / "in" / "model.safetensors")  # fmt: skip
    made = planned(module, hq=2, hkv=2, args=(x,), dynamic_shapes=None)
    assert len(made.unstored) == 1 and made.unstored[0].endswith("slopes")
    report = convert_files(tmp_path / "in", tmp_path / "out", {}, lambda: made)
    assert any("slopes" in note for note in report.notes)
    state = converted.state_dict()
    found = tensors(tmp_path / "out")
    assert found["net.again.q.weight"].shape == (12, 24)
    for name, tensor in found.items():
        key = name.removeprefix("net.")
        assert torch.equal(tensor, state[key if key in state else key.replace("again", "first")]), name


def parameter(axis: int) -> ParameterPlan:
    blocks = (
        HeadBlock("q", 2, ("0:2",), (("4:6",),), (("4:6",),)),
        HeadBlock("k", 0, ("2:4",), (("0:2",), ("8:10",), ("6:8",)), (("0:2",), ("8:10",), ("6:8",))),
        HeadBlock("rest", -1, ("4:7",), (("10:13",),), (("10:13",),)),
    )
    return ParameterPlan("w", axis, (13, 7), (), blocks, ("2:4",))


def by_streaming(folder: Path, tensor: Tensor, cut: TensorCut) -> Tensor:
    save_file({"a": torch.zeros(3), "w": tensor}, folder / "x.safetensors")
    header = read_header(folder / "x.safetensors")
    entry = next(e for e in header.entries if e.name == "w")
    written = bytearray()

    class Collect:
        def write(self, data: memoryview) -> None:
            written.extend(data)

    source = Source(folder / "x.safetensors", header.data_start)
    cut.write(source, entry, Collect())
    source.close()
    assert len(written) == cut.bytes(entry)
    return torch.frombuffer(written, dtype=tensor.dtype).view(cut.shape(entry))


@pytest.mark.parametrize("chunk", [16, 200, 1 << 20])
@pytest.mark.parametrize(("shape", "axis"), [((13,), 0), ((13, 5), 0), ((5, 13), 1), ((3, 13, 5), 1), ((1, 13, 4), 1)])
def test_pieces_are_the_whole(
    shape: tuple[int, ...], axis: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqa_fx.checkpoint_cut.CHUNK", chunk)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.int32):
        tensor = (torch.randn(shape) * 50).to(dtype)
        got = by_streaming(tmp_path, tensor, TensorCut("w", parameter(axis)))
        assert torch.equal(got, cut_tensor(tensor, parameter(axis))), dtype
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensor = torch.randn(shape).to(dtype)
        got = by_streaming(tmp_path, tensor, TensorCut("w", parameter(axis)))
        assert torch.equal(got.double(), cut_tensor(tensor.double(), parameter(axis)).to(dtype).double())


def test_rotated_and_refitted(tmp_path: Path) -> None:
    tensor, turn = torch.randn(13, 5), torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0]
    rotation = Rotation("w", 0, ("8:10",), "r")
    got = by_streaming(tmp_path, tensor, TensorCut("w", parameter(0), (rotation,), None, {"r": turn}))
    assert torch.equal(got, cut_tensor(rotated(tensor, [rotation], {"r": turn}), parameter(0)))
    new = torch.randn(7, 5, dtype=torch.float64)
    assert torch.equal(by_streaming(tmp_path, tensor, TensorCut("w", parameter(0), (), new)), new.float())
    assert torch.equal(by_streaming(tmp_path, tensor, TensorCut("w", None, (rotation,), None, {"r": turn})),
                       rotated(tensor, [rotation], {"r": turn}))  # fmt: skip
    with pytest.raises(InputError, match=r"shape \[5, 7\]; cut, it has shape \[7, 5\]"):
        by_streaming(tmp_path, tensor, TensorCut("w", parameter(0), (), new.T))


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans are made in this process: a new one takes long to import everything."""
    monkeypatch.setattr(cli_checkpoint, "_in_a_process", cli_checkpoint._planned)
    with warnings.catch_warnings():
        yield


@pytest.mark.usefixtures("_here")
def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert main(["plan", str(checkpoint), "--hq", "4", "--hkv", "2", "--static", "-o", str(plan)]) == 0
    assert "model.layers.0.self_attn: 8/4 -> 4/2 heads" in capsys.readouterr().out
    assert main(["plan", str(checkpoint), "--hq", "4", "-o", str(plan)]) == 2
    command = ["convert-checkpoint", str(checkpoint), str(out)]
    assert main([*command, "--plan", str(plan), "--jobs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors_cut"] == 4 * LAYERS
    assert main([*command, "--plan", str(plan), "--hq", "3"]) == 2
    assert main(command) == 2 and main([*command, "--hq", "4", "--hkv", "2"]) == 2
    assert main([*command, "--plan", str(plan), "--overwrite"]) == 0
    assert "4/2" in capsys.readouterr().out and sqa_fx.verify_checkpoint(out)
    assert main(["convert-checkpoint", str(tmp_path / "none"), str(out), "--hq", "4"]) == 3


@pytest.mark.slow
def test_command_line_plans_in_a_process(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["convert-checkpoint", str(checkpoint), str(tmp_path / "out"), "--hq", "4", "--hkv", "2"]) == 0
    with pytest.raises(PlanError, match="99"):
        cli_checkpoint._in_a_process(checkpoint, {"hq": 99})


def test_requests_that_cannot_be(checkpoint: Path, converted: Any, tmp_path: Path) -> None:
    for options in ({}, {"hq": 4, "plan": converted.plan}, {"hq": 4, "heads": "importance"}, {"hq": 4, "jobs": 0},
                    {"hq": 4, "kv_merge": "aligned"}):  # fmt: skip
        with pytest.raises(InputError):
            sqa_fx.convert_checkpoint(checkpoint, tmp_path / "out", **options)
    with pytest.raises(PlanError, match="hq=99 is not between"):
        sqa_fx.convert_checkpoint(checkpoint, tmp_path / "out", hq=99, dynamic_shapes=None)
    assert os.listdir(tmp_path) == []
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="names no architecture"):
        sqa_fx.plan(tmp_path, hq=1)
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(InputError, match="NoSuchModel"):
        sqa_fx.plan(tmp_path, hq=1)
    with pytest.raises(MissingError, match="no such file"):
        sqa_fx.plan(tmp_path / "none", hq=1)
