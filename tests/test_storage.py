"""Saved programs: what is loaded is what was saved, and no file can do more than hold one."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from sqa_fx.errors import InputError, MissingError
from sqa_fx.program_json import check_program_json
from sqa_fx.storage import META, PROGRAM, WEIGHTS, dynamic_shapes_of, load_program, save_program

Program = torch.export.ExportedProgram


class Tied(nn.Module):
    """Vocabulary 13, width 12, heads 3; output weights tied to the embedding; a buffer that is not saved as state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 12)
        self.qkv = nn.Linear(12, 36)
        self.head = nn.Linear(12, 13, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(12, 12).t(), requires_grad=False)
        self.register_buffer("bias", torch.randn(12))
        self.register_buffer("phase", torch.randn(4), persistent=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids) @ self.frozen + self.bias
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q + self.get_buffer("phase"), k, v, is_causal=True)
        return {"logits": self.head(y.transpose(1, 2).flatten(2) * torch.tensor(0.5))}


def export(model: nn.Module) -> Program:
    auto = torch.export.Dim.AUTO
    ids = torch.randint(0, 13, (3, 5))
    ep = torch.export.export(model.eval(), (ids,), dynamic_shapes=({0: auto, 1: auto},))
    functional: Program = ep.run_decompositions({})
    return functional


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return export(Tied())


@pytest.fixture
def saved(program: Program, tmp_path: Path) -> Path:
    save_program(program, tmp_path / "saved", {"plan": {"hq": 2}})
    return tmp_path / "saved"


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file of a saved program and mend every hash, as one with ill intent would."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    body = json.loads((folder / META).read_text())
    body.pop("sha256")
    body["files"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in (WEIGHTS, PROGRAM)}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    (folder / META).write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), **body}))


def nodes(value: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = value["graph_module"]["graph"]["nodes"]
    return found


def test_round_trip_is_bit_exact_and_stays_dynamic(program: Program, saved: Path) -> None:
    loaded, extra = load_program(saved)
    assert extra == {"plan": {"hq": 2}}
    assert {p.name for p in saved.iterdir()} == {WEIGHTS, PROGRAM, META}
    for shape in ((3, 5), (7, 11)):
        ids = torch.randint(0, 13, shape)
        assert torch.equal(loaded.module()(ids)["logits"], program.module()(ids)["logits"])
    assert [*loaded.state_dict] == [*program.state_dict]
    assert [*loaded.constants] == [*program.constants]
    assert loaded.example_inputs is not None and program.example_inputs is not None
    assert torch.equal(loaded.example_inputs[0][0], program.example_inputs[0][0])


def test_a_loaded_program_is_exported_again_with_the_same_free_dimensions(saved: Path) -> None:
    loaded, _ = load_program(saved)
    module = loaded.module(check_guards=False)
    names = list(inspect.signature(module.forward).parameters)
    shapes = dynamic_shapes_of(loaded, names)
    assert [sorted(dims) for dims in shapes.values()] == [[0, 1]]
    assert loaded.example_inputs is not None
    again = torch.export.export(module, *loaded.example_inputs, dynamic_shapes=shapes)
    ids = torch.randint(0, 13, (7, 11))
    assert torch.equal(again.module()(ids)["logits"], module(ids)["logits"])


def test_tied_weights_are_stored_once_and_tied_again(saved: Path) -> None:
    with safe_open(saved / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
    assert len(names & {"embed.weight", "head.weight"}) == 1
    state = load_program(saved)[0].state_dict
    assert state["embed.weight"] is state["head.weight"]
    assert isinstance(state["embed.weight"], nn.Parameter)
    assert state["embed.weight"].requires_grad


def test_strides_and_requires_grad_survive(program: Program, saved: Path) -> None:
    state = load_program(saved)[0].state_dict
    assert state["frozen"].stride() == program.state_dict["frozen"].stride() == (1, 12)
    assert not state["frozen"].requires_grad
    assert not isinstance(state["bias"], nn.Parameter)


def test_overlapping_views_share_memory_again(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.randn(7, 5)
            self.register_buffer("top", base[:5])
            self.register_buffer("bottom", base[2:])

        def forward(self, x: Tensor) -> Tensor:
            return x + self.get_buffer("top") - self.get_buffer("bottom")

    x = torch.randn(5, 5)
    ep = torch.export.export(Views(), (x,))
    save_program(ep, tmp_path / "views", {})
    loaded, _ = load_program(tmp_path / "views")
    assert torch.equal(loaded.module()(x), ep.module()(x))
    loaded.state_dict["top"][2:].fill_(3.0)
    assert bool((loaded.state_dict["bottom"][:3] == 3.0).all())


def test_dtypes_survive(tmp_path: Path) -> None:
    model = Tied().to(torch.bfloat16)
    save_program(export(model), tmp_path / "half", {})
    assert load_program(tmp_path / "half")[0].state_dict["qkv.weight"].dtype is torch.bfloat16


def test_transformers_output_types(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=3
    )
    ids = torch.randint(0, 13, (2, 7))
    ep = torch.export.export(transformers.BertModel(config).eval(), (), {"input_ids": ids})
    save_program(ep, tmp_path / "bert", {})
    found = load_program(tmp_path / "bert")[0].module()(input_ids=ids)
    assert type(found) is type(ep.module()(input_ids=ids))
    assert torch.equal(found.last_hidden_state, ep.module()(input_ids=ids).last_hidden_state)


def test_unregistered_type_is_named(saved: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        signature = value["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = signature["out_spec"].replace('"builtins.dict"', '"shop.models.Answer"')

    rewrite(saved, PROGRAM, change)
    with pytest.raises(MissingError, match=r"shop\.models\.Answer, which is not registered"):
        load_program(saved)


def test_existing_path_is_kept(program: Program, saved: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(InputError, match="exists"):
        save_program(program, saved, {"plan": 2})
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    save_program(program, saved, {"plan": 2}, overwrite=True)
    assert load_program(saved)[1] == {"plan": 2}
    assert os.listdir(saved.parent) == ["saved"]


def test_overwrite_never_removes_something_else(program: Program, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(InputError, match="not a program saved by sqa-fx"):
        save_program(program, tmp_path / "thesis", {}, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


def test_nothing_is_left_when_saving_fails(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="must be JSON"):
        save_program(program, tmp_path / "a", {"plan": object()})
    with pytest.raises(InputError, match="does not exist"):
        save_program(program, tmp_path / "no" / "such" / "folder", {})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sqa_fx.storage.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        save_program(program, tmp_path / "b", {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [WEIGHTS, PROGRAM, META])
def test_truncated_file_is_named(saved: Path, name: str) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=rf"{name}.*(SHA-256 mismatch|not JSON).*truncated|{name} is not JSON"):
        load_program(saved)


def test_altered_byte_is_found(saved: Path) -> None:
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (saved / WEIGHTS).write_bytes(data)
    with pytest.raises(InputError, match=rf"{WEIGHTS}: SHA-256 mismatch"):
        load_program(saved)


def test_altered_plan_is_found(saved: Path) -> None:
    (saved / META).write_text((saved / META).read_text().replace('"hq": 2', '"hq": 3'))
    with pytest.raises(InputError, match=rf"{META}: SHA-256 mismatch"):
        load_program(saved)


def test_missing_and_foreign(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_program(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"no {META}"):
        load_program(tmp_path)
    (saved / PROGRAM).unlink()
    with pytest.raises(InputError, match=f"{PROGRAM} is missing"):
        load_program(saved)
    (saved / META).write_text('{"format": "other"}')
    with pytest.raises(InputError, match="'other'"):
        load_program(saved)
    (saved / META).write_text('{"format": "sqa-fx-program", "version": 99}')
    with pytest.raises(InputError, match="version 99"):
        load_program(saved)


def test_files_of_two_programs_do_not_mix(saved: Path, tmp_path: Path) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    save_program(torch.export.export(Other(), (torch.ones(3),)), tmp_path / "other", {})
    (saved / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    rewrite(saved, PROGRAM, lambda _: None)
    with pytest.raises(InputError, match="do not fit each other"):
        load_program(saved)


EVIL = "__import__('os').system('touch pwned')"


def evil_guard(value: dict[str, Any]) -> None:
    value["guards_code"] = [EVIL]


def evil_size(value: dict[str, Any]) -> None:
    def visit(part: Any) -> bool:
        if isinstance(part, dict):
            if "expr_str" in part:
                part["expr_str"] = EVIL
                return True
            return any(visit(child) for child in part.values())
        return isinstance(part, list) and any(visit(child) for child in part)

    assert visit(value), "the program has no size expression to attack"


def evil_symbol(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    assert "Symbol('" in text
    value.update(json.loads(text.replace("Symbol('", "Symbol('a b; ")))


def evil_target(value: dict[str, Any]) -> None:
    nodes(value)[0]["target"] = "torch.hub.load"


def evil_library(value: dict[str, Any]) -> None:
    nodes(value)[0]["target"] = "torch.ops.load_library"


def evil_factory(value: dict[str, Any]) -> None:
    context = json.dumps({"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": []})
    spec = [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]
    value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(spec)


def evil_enum(value: dict[str, Any]) -> None:
    context = json.dumps([{"__enum__": True, "fqn": "antigravity:fly", "name": "x"}])
    spec = [1, {"type": "builtins.dict", "context": context, "children_spec": []}]
    value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(spec)


@pytest.mark.parametrize(
    "change", [evil_guard, evil_size, evil_symbol, evil_target, evil_library, evil_factory, evil_enum]
)
def test_nothing_in_a_program_is_run(
    saved: Path, change: Callable[[dict[str, Any]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite(saved, PROGRAM, change)
    with pytest.raises(InputError, match=r"program\.json: "):
        load_program(saved)
    assert not (tmp_path / "pwned").exists()


def test_pickle_is_never_called(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert load_program(saved)[1] == {"plan": {"hq": 2}}


def test_checker_lets_arithmetic_of_sizes_through() -> None:
    for expr in ("Mul(Integer(8), Symbol('s27', positive=True, integer=True))", "s0*s1 + 1", "Max(1, s0//2)"):
        check_program_json({"graph_module": {"sizes": [{"expr_str": expr}]}}, "case")
    with pytest.raises(InputError, match="not a size expression"):
        check_program_json({"graph_module": {"sizes": [{"expr_str": "s0.__class__"}]}}, "case")
