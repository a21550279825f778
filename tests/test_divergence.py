"""first_divergent_site: engines that compute one attention wrongly, and what is said of them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

import sqa_fx
from sqa_fx import ConvertedModule
from sqa_fx.cli import main
from sqa_fx.divergence import Build, attention_outputs, first_divergent_site, onnx_engine
from sqa_fx.errors import InputError, MissingError, NoAttentionError
from sqa_fx.passes.aten_call import op_name, set_argument
from sqa_fx.runners import EagerRunner, Runner

SITES = [f"blocks.{i}" for i in range(4)]
Break = Callable[[fx.GraphModule], None]


class Block(nn.Module):
    """Residual self-attention over ``[batch, seq, 24]`` with 4 heads of size 6."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.o(y.transpose(1, 2).flatten(2))
        return out


class Stack(nn.Module):
    """Some of them, and a head that is no attention."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(blocks)), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x), "last": x}


@pytest.fixture(scope="module")
def converted() -> ConvertedModule:
    torch.manual_seed(0)
    return convert(Stack())


@pytest.fixture(scope="module")
def small() -> ConvertedModule:
    """Of two blocks, where an engine takes long."""
    torch.manual_seed(0)
    return convert(Stack(2))


def convert(model: nn.Module) -> ConvertedModule:
    made = sqa_fx.convert(model.eval(), hq=2, hkv=1, args=(noise(2, 7),), verify=False)
    assert isinstance(made, ConvertedModule)
    return made


def noise(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(3))


def sdpa(module: fx.GraphModule, number: int) -> fx.Node:
    nodes: list[fx.Node] = [n for n in module.graph.nodes if op_name(n) == "scaled_dot_product_attention"]
    return nodes[number]


def causal(number: int) -> Break:
    return lambda module: set_argument(sdpa(module, number), "is_causal", True)


def scaled(number: int) -> Break:
    return lambda module: set_argument(sdpa(module, number), "scale", 2.0)


def wrong_head(module: fx.GraphModule) -> None:
    node = next(n for n in module.graph.nodes if op_name(n) == "linear" and str(n.args[1]) == "head_weight")
    with module.graph.inserting_after(node):
        twice = module.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.01))
    node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)


def engine(change: Break | None, built: list[ExportedProgram]) -> Build:
    """A build that runs the program eagerly after ``change``; programs are collected in ``built``."""

    def build(program: ExportedProgram) -> Runner:
        built.append(program)
        module = program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        if change is not None:
            change(module)
            module.recompile()
        return EagerRunner(module)

    return build


@pytest.mark.parametrize(("change", "number"), [(causal, 0), (scaled, 1), (scaled, 3)])
def test_the_first_wrong_site_is_named(converted: ConvertedModule, change: Callable[[int], Break], number: int) -> None:
    built: list[ExportedProgram] = []
    found = first_divergent_site(converted, engine(change(number), built), ((noise(3, 11),), {}))
    assert found is not None
    assert found.site == SITES[number]
    assert found.agrees_until == (SITES[number - 1] if number else None)
    assert found.error > found.tolerance > 0
    assert found.engines == len(built) <= 3
    assert (found.sites, found.reference_dtype, found.notes) == (4, "float64", ())
    assert "test_divergence.py:" in found.location
    assert SITES[number] in str(found) and found.problem in str(found)


def test_two_wrong_sites_give_the_first(converted: ConvertedModule) -> None:
    def both(module: fx.GraphModule) -> None:
        causal(1)(module)
        scaled(3)(module)

    found = first_divergent_site(converted, engine(both, []), ((noise(2, 7),), {}))
    assert found is not None and found.site == SITES[1]


def test_behind_the_last_site(converted: ConvertedModule) -> None:
    built: list[ExportedProgram] = []
    found = first_divergent_site(converted, engine(wrong_head, built), ((noise(2, 7),), {}))
    assert found is not None
    assert found.site is None and found.agrees_until == SITES[-1] and found.error > found.tolerance
    assert "after the last site, 'blocks.3'" in str(found)
    assert found.engines == len(built) <= 3


def test_a_healthy_engine_gives_none_at_once(converted: ConvertedModule) -> None:
    built: list[ExportedProgram] = []
    assert first_divergent_site(converted, engine(None, built), ((noise(2, 7),), {})) is None
    assert len(built) == 1


def test_atol(converted: ConvertedModule) -> None:
    assert first_divergent_site(converted, engine(causal(0), []), ((noise(2, 7),), {}), atol=1e6) is None


def test_the_module_is_not_touched(converted: ConvertedModule) -> None:
    x = noise(2, 7)
    before, code = converted(x), converted.graph_module.code
    first_divergent_site(converted, engine(causal(2), []), ((x,), {}))
    after = converted(x)
    assert converted.graph_module.code == code and after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_programs_have_the_inputs_of_the_model_and_free_sizes(converted: ConvertedModule) -> None:
    """By keyword, at other sizes than the example's: the call is laid out as the graph takes it."""
    built: list[ExportedProgram] = []
    found = first_divergent_site(converted, engine(causal(0), built), ((), {"x": noise(3, 5)}))
    assert found is not None and found.site == SITES[0]
    out = built[0].module()(noise(5, 13))
    assert out.keys() == {"outputs", "site"} and out["outputs"].keys() == {"logits", "last"}
    assert out["site"].shape == (5, 2, 13, 6)


def test_half_precision_is_judged_by_its_own_error(converted: ConvertedModule) -> None:
    half = copy.deepcopy(converted).bfloat16()
    assert first_divergent_site(half, engine(None, []), ((noise(2, 7).bfloat16(),), {})) is None
    found = first_divergent_site(half, engine(causal(2), []), ((noise(2, 7).bfloat16(),), {}))
    assert found is not None and found.site == SITES[2] and found.tolerance > 1.6e-2


def test_exported_program() -> None:
    torch.manual_seed(0)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(Stack(2).eval(), (noise(2, 7),), dynamic_shapes={"x": {0: auto, 1: auto}})
    for number in (0, 1):
        found = first_divergent_site(program, engine(scaled(number), []), ((noise(3, 9),), {}))
        assert found is not None and found.site == SITES[number]


def test_names_are_those_of_the_report(converted: ConvertedModule, tmp_path: Path) -> None:
    assert [site.name for site in attention_outputs(converted.graph_module)] == SITES
    assert [site.name for site in converted.report.sites] == SITES
    converted.save(tmp_path / "saved")
    assert [site.name for site in attention_outputs(sqa_fx.load(tmp_path / "saved").graph_module)] == SITES


def test_attention_that_is_written_out() -> None:
    class Plain(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = (q @ k.transpose(-1, -2) / 6**0.5).softmax(-1) @ v
            out: Tensor = x + self.o(y.transpose(1, 2).flatten(2))
            return out

    def colder(module: fx.GraphModule) -> None:
        softmax = next(n for n in module.graph.nodes if "softmax" in op_name(n))
        with module.graph.inserting_before(softmax):
            twice = module.graph.call_function(torch.ops.aten.mul.Tensor, (softmax.args[0], 2.0))
        softmax.update_arg(0, twice)

    torch.manual_seed(0)
    program = torch.export.export(nn.Sequential(Plain(), Plain()).eval(), (noise(2, 7),))
    found = first_divergent_site(program, engine(colder, []), ((noise(2, 7),), {}))
    assert found is not None and (found.site, found.sites, found.agrees_until) == ("0", 2, None)


def test_an_engine_that_cannot_be_compared(converted: ConvertedModule) -> None:
    class Fails(EagerRunner):
        def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
            raise RuntimeError("out of memory\nlong story")

    class Short(EagerRunner):
        def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
            return super().run(args, kwargs)[:-1]

    for runner, message in ((Fails, "out of memory"), (Short, "2 outputs instead of 3")):
        with pytest.raises(InputError, match=f"shows site 'blocks.1' cannot be compared: .*{message}"):
            first_divergent_site(converted, lambda p, r=runner: r(p.module()), ((noise(2, 7),), {}))  # type: ignore[misc]


def test_an_engine_that_changes_with_its_outputs(converted: ConvertedModule) -> None:
    built: list[ExportedProgram] = []

    def build(program: ExportedProgram) -> Runner:
        return engine(None if built else wrong_head, built)(program)

    with pytest.raises(InputError, match="depends on what it returns"):
        first_divergent_site(converted, build, ((noise(2, 7),), {}))


def test_no_attention() -> None:
    program = torch.export.export(nn.Linear(24, 3).eval(), (noise(2, 7),))
    with pytest.raises(NoAttentionError, match="no attention"):
        first_divergent_site(program, engine(None, []), ((noise(2, 7),), {}))


def test_onnx_engines(small: ConvertedModule) -> None:
    """The graph of one site is spoiled before its export, as a wrong translation would."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")

    def broken(program: ExportedProgram) -> Runner:
        causal(1)(program.graph_module)
        return onnx_engine(program)

    inputs: tuple[tuple[Tensor], dict[str, Any]] = ((noise(3, 5),), {})
    found = first_divergent_site(small, broken, inputs)
    assert found is not None and found.site == SITES[1]
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["engines"] == found.engines == 2
    assert first_divergent_site(small, onnx_engine, inputs) is None


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(small: ConvertedModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a conversion ("out"), its export and one with a causal site; both with a sidecar."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from sqa_fx.exporters.ranges import input_specs
    from sqa_fx.exporters.sidecar import Sidecar
    from sqa_fx.exporters.to_onnx import export_onnx

    folder = tmp_path_factory.mktemp("written")
    small.save(folder / "out")
    program = small.exported_program()
    inputs = input_specs(program, {"x.0": (2, 2, 5), "x.1": (3, 7, 16)})
    for name in ("good.onnx", "bad.onnx"):
        if name == "bad.onnx":
            causal(1)(program.graph_module)
        Sidecar("onnx", inputs, ()).write(export_onnx(program, folder / name).path)
    return folder


@pytest.fixture
def files(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them in a folder of its own, the current one."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["validate", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_command_compares_at_the_shapes_of_the_sidecar(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "out", "good.onnx")
    assert found["passed"] and found["labels"] == ["min 2x3x24", "opt 2x7x24", "max 5x16x24", "odd 3x11x24"]
    assert "divergence" not in found
    assert report(capsys, "out", "good.onnx", "--shapes", "max, min")["labels"] == ["min 2x3x24", "max 5x16x24"]
    given = report(capsys, "out", "good.onnx", "--input", "x:float32[4,9,24]")
    assert given["labels"] == [] and given["comparisons"][0]["compared"] == 4 * 9 * 5
    for arguments, message in (
        (["--shapes", "huge"], "no shapes huge"),
        (["--shapes", "min", "--input", "x:float32[4,9,24]"], "give one of them"),
    ):
        assert main(["validate", "out", "good.onnx", *arguments]) == 2
        assert message in capsys.readouterr().err
    (files / "good.onnx.json").unlink()
    assert main(["validate", "out", "good.onnx", "--shapes", "min"]) == 2
    assert "no artifact has a sidecar" in capsys.readouterr().err
    assert report(capsys, "out", "good.onnx")["labels"] == []


def test_command_locates(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference exported again agrees, so the file is at fault; where the exporter is, the site is named."""
    small = ("--shapes", "opt", "--locate")
    assert report(capsys, "out", "good.onnx", *small)["divergence"] == {}
    assert report(capsys, "out", "good.onnx", "bad.onnx", *small, code=1)["divergence"] == {
        "bad.onnx": "agrees when the reference is exported now: the file is of another model"
    }

    def broken(program: ExportedProgram) -> Runner:
        return engine(causal(1), [])(program)

    monkeypatch.setattr("sqa_fx.cli_compare.onnx_engine", broken)
    found = report(capsys, "out", "bad.onnx", *small, code=1)["divergence"]["bad.onnx"]
    assert (found["site"], found["agrees_until"]) == ("blocks.1", "blocks.0")
    assert main(["validate", "out", "bad.onnx", *small]) == 1
    assert "bad.onnx: the engine first differs at site 'blocks.1'" in capsys.readouterr().out

    def absent(program: ExportedProgram) -> Runner:
        raise MissingError("no onnx here")

    monkeypatch.setattr("sqa_fx.cli_compare.onnx_engine", absent)
    found = report(capsys, "out", "bad.onnx", *small, code=1)
    assert found["divergence"] == {"bad.onnx": "not located: no onnx here"} and found["comparisons"]


def test_command_locates_in_conversions_only(capsys: pytest.CaptureFixture[str]) -> None:
    same = "torch.nn:Identity"
    assert main(["validate", same, same, "--locate", "--input", "input:float32[2]"]) == 2
    assert "--locate: torch.nn:Identity is no conversion" in capsys.readouterr().err
