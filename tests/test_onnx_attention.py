"""Every way to call scaled_dot_product_attention, exported and run by ONNX Runtime, against torch."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqa_fx.errors import InputError
from sqa_fx.exporters.sdpa_translation import AttentionForm, translation_table

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

# Every axis has a size of its own, so that swapped axes cannot agree by chance.
HQ, HKV, D, DV = 10, 5, 17, 13
SHAPES = ({"b": 3, "l": 7, "s": 11, "n": 29}, {"b": 2, "l": 23, "s": 19, "n": 31})
OPSETS = (18, 23, 24)
AUTO = torch.export.Dim.AUTO

Inputs = dict[str, Tensor]
sdpa = F.scaled_dot_product_attention


def make_inputs(b: int, l: int, s: int, n: int) -> Inputs:  # noqa: E741
    g = torch.Generator().manual_seed(b * 1000 + l)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "q": rand(b, HQ, l, D),
        "k": rand(b, HKV, s, D),
        "v": rand(b, HKV, s, DV),
        "w": rand(b, HKV, l, DV),  # values as long as the queries
        "many": rand(b, n, l, D),  # a number of heads that export cannot know
        "bias": rand(b, HQ, l, s),
        "keep": rand(b, HQ, l, s) > -0.5,
    }


DYNAMIC: dict[str, dict[int, Any]] = {
    "q": {0: AUTO, 2: AUTO},
    "k": {0: AUTO, 2: AUTO},
    "v": {0: AUTO, 2: AUTO},
    "w": {0: AUTO, 2: AUTO},
    "many": {0: AUTO, 1: AUTO, 2: AUTO},
    "bias": {0: AUTO, 2: AUTO, 3: AUTO},
    "keep": {0: AUTO, 2: AUTO, 3: AUTO},
}


def first_key(keep: Tensor) -> Tensor:
    """The mask with at least one key left for every query."""
    return keep | (torch.arange(keep.shape[-1]) == 0)


def dead_row(keep: Tensor) -> Tensor:
    """The mask with every third query seeing nothing."""
    return first_key(keep) & (torch.arange(keep.shape[-2]) % 3 != 1)[:, None]


def additive(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))


def five(x: Tensor) -> Tensor:
    """``[b, h, s, d] -> [b, 2, h, s, d]``."""
    return x[:, None].expand(-1, 2, -1, -1, -1)


def gqa(i: Inputs, **options: Any) -> Tensor:
    return sdpa(i["q"], i["k"], i["v"], enable_gqa=True, **options)


def masked(mask: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda i: gqa(i, attn_mask=mask(i))


CASES: dict[str, Callable[[Inputs], Tensor]] = {
    "gqa": gqa,
    "equal_heads": lambda i: sdpa(i["q"][:, :HKV], i["k"], i["v"]),
    "equal_heads_with_enable_gqa": lambda i: sdpa(i["q"][:, 1 : HKV + 1], i["k"], i["v"], enable_gqa=True),
    "one_kv_head": lambda i: sdpa(i["q"], i["k"][:, 1:2], i["v"][:, 2:3]),
    "one_kv_head_with_enable_gqa": lambda i: sdpa(i["q"], i["k"][:, :1], i["v"][:, :1], enable_gqa=True),
    "one_value_head": lambda i: sdpa(i["q"][:, :HKV], i["k"], i["v"][:, 1:2]),
    "one_query_head": lambda i: sdpa(i["q"][:, 3:4], i["k"], i["v"]),
    "scale": lambda i: gqa(i, scale=0.31),
    "scale_negative": lambda i: gqa(i, scale=-0.31),
    "scale_zero": lambda i: gqa(i, scale=0.0),
    "causal": lambda i: sdpa(i["q"], i["q"][:, ::2], i["w"], is_causal=True, enable_gqa=True),
    "causal_cross": lambda i: gqa(i, is_causal=True),
    "causal_cross_other_way": lambda i: sdpa(i["k"], i["q"][:, :5], i["w"], is_causal=True),
    "bool_LS": masked(lambda i: first_key(i["keep"][0, 0])),
    "bool_1S": masked(lambda i: first_key(i["keep"][0, 0, :1])),
    "bool_L1": masked(lambda i: i["keep"][0, 0, :, :1]),
    "bool_HLS": masked(lambda i: first_key(i["keep"][1])),
    "bool_B11S": masked(lambda i: first_key(i["keep"][:, :1, :1])),
    "bool_B1LS": masked(lambda i: first_key(i["keep"][:, 2:3])),
    "bool_BH1S": masked(lambda i: first_key(i["keep"][:, :, :1])),
    "bool_BHLS": masked(lambda i: first_key(i["keep"])),
    "bool_1HLS": masked(lambda i: first_key(i["keep"][:1])),
    "bool_dead_rows": masked(lambda i: dead_row(i["keep"][:, :1])),
    "bool_dead_rows_per_head": masked(lambda i: dead_row(i["keep"])),
    "float_LS": masked(lambda i: i["bias"][0, 0]),
    "float_1S": masked(lambda i: i["bias"][0, 0, :1]),
    "float_HLS": masked(lambda i: i["bias"][1]),
    "float_B11S": masked(lambda i: i["bias"][:, :1, :1]),
    "float_B1LS": masked(lambda i: i["bias"][:, 2:3]),
    "float_BHLS": masked(lambda i: i["bias"]),
    "float_1HLS": masked(lambda i: i["bias"][:1]),
    "float_finfo_min": masked(lambda i: additive(first_key(i["keep"])).clamp(min=torch.finfo(torch.float32).min)),
    "float_dead_rows": masked(lambda i: additive(dead_row(i["keep"][:, :1]))),
    "2d": lambda i: sdpa(i["q"][0, 0], i["k"][0, 0], i["v"][0, 0]),
    "3d": lambda i: sdpa(i["q"][:, :5].flatten(0, 1), i["k"].flatten(0, 1), i["v"].flatten(0, 1)),
    "3d_mask": lambda i: sdpa(i["q"][:, 0], i["k"][:, 0], i["v"][:, 0], attn_mask=i["bias"][:, 0]),
    "3d_mask_LS": lambda i: sdpa(i["q"][:, 1], i["k"][:, 1], i["v"][:, 1], attn_mask=i["bias"][0, 0]),
    "3d_gqa": lambda i: sdpa(i["q"][0], i["k"][0], i["v"][0], enable_gqa=True),
    "5d": lambda i: sdpa(i["q"].unflatten(1, (2, 5)), five(i["k"]), five(i["v"])),
    "5d_broadcast": lambda i: sdpa(i["q"].unflatten(1, (2, 5)), i["k"][:, None], i["v"][:, None]),
    "5d_mask_B111S": lambda i: sdpa(
        i["q"].unflatten(1, (2, 5)),
        five(i["k"]),
        five(i["v"]),
        attn_mask=first_key(i["keep"][:, :1, :1])[:, None],
    ),
    "one_batch_of_keys": lambda i: sdpa(i["q"][:, :5], i["k"][:1], i["v"][:1]),
    "one_batch_of_queries": lambda i: sdpa(i["q"][:1, :5], i["k"], i["v"]),
    "dynamic_heads": lambda i: sdpa(i["many"], i["many"] * 0.5, i["many"] + 1.0),
    "dynamic_heads_mask": lambda i: sdpa(
        i["many"], i["many"] * 0.5, i["many"] + 1.0, attn_mask=(i["many"] @ i["many"].mT)[:, :1]
    ),
    "dynamic_heads_causal": lambda i: sdpa(i["many"], i["many"] * 0.5, i["many"] + 1.0, is_causal=True),
}


class Cases(nn.Module):
    """All cases as the outputs of one graph: one export per opset instead of one per case."""

    def __init__(self, names: tuple[str, ...] = tuple(CASES)) -> None:
        super().__init__()
        self.names = names

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, w: Tensor, many: Tensor, bias: Tensor, keep: Tensor
    ) -> tuple[Tensor, ...]:
        i = {"q": q, "k": k, "v": v, "w": w, "many": many, "bias": bias, "keep": keep}
        return tuple(CASES[name](i) for name in self.names)


def export(
    module: nn.Module | torch.export.ExportedProgram,
    inputs: Inputs,
    opset: int,
    dynamic_shapes: Any = None,
    form: AttentionForm = "auto",
) -> Any:
    return torch.onnx.export(
        module.eval() if isinstance(module, nn.Module) else module,
        (),
        kwargs=inputs,
        dynamic_shapes=dynamic_shapes,
        opset_version=opset,
        custom_translation_table=translation_table(opset, form),
        verbose=False,
    )


def session(program: Any) -> Any:
    buffer = io.BytesIO(program.model_proto.SerializeToString())
    return ort.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])


# One of each kind. The rest, masks of more shapes for example, is marked slow and exported in a graph of its own.
SHORT = (
    "gqa", "equal_heads", "one_kv_head", "scale_negative", "causal", "causal_cross", "bool_B11S", "bool_BHLS",
    "bool_dead_rows", "float_finfo_min", "float_dead_rows", "2d", "5d_mask_B111S", "one_batch_of_keys",
    "dynamic_heads_mask", "dynamic_heads_causal",
)  # fmt: skip


def names(opset: int, short: bool = True) -> tuple[str, ...]:
    """The cases at an opset. Opset 23 writes attention with the op that 24 writes it with, so it gets a few."""
    return tuple(name for name in CASES if (name in SHORT) == short)[:: 5 if opset == 23 else 1]


@cache
def captured(cases: tuple[str, ...]) -> torch.export.ExportedProgram:
    return torch.export.export(Cases(cases).eval(), (), kwargs=make_inputs(**SHAPES[0]), dynamic_shapes=DYNAMIC)


@cache
def exported(opset: int, short: bool = True) -> tuple[Any, Any]:
    program = export(captured(names(opset, short)), {}, opset)
    return program, session(program)


@cache
def results(opset: int, shape: int, short: bool = True) -> dict[str, Tensor]:
    _, run = exported(opset, short)
    inputs = make_inputs(**SHAPES[shape])
    out = run.run(None, {i.name: inputs[i.name].numpy() for i in run.get_inputs()})
    return {name: torch.from_numpy(value) for name, value in zip(names(opset, short), out, strict=True)}


RUNS = [
    pytest.param(case, opset, marks=[] if short else pytest.mark.slow)
    for short in (True, False)
    for opset in OPSETS
    for case in names(opset, short)
]


@pytest.mark.parametrize("shape", [0, 1], ids=["as_exported", "other_shape"])
@pytest.mark.parametrize(("case", "opset"), RUNS)
def test_against_torch(case: str, opset: int, shape: int) -> None:
    inputs = make_inputs(**SHAPES[shape])
    want = CASES[case]({name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    got = results(opset, shape, case in SHORT)[case].double()
    assert got.shape == want.shape
    assert want.isfinite().all()
    torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


CAUSAL = tuple(name for name in CASES if "causal" in name)
FORMS: tuple[AttentionForm, ...] = ("causal", "masked", "plain")


@cache
def causal_in(form: AttentionForm) -> tuple[Any, Any]:
    """The causal cases at opset 24 in this form, and a session of them."""
    program = export(captured(CAUSAL), {}, 24, form=form)
    return program, session(program)


@cache
def causal_results(form: AttentionForm, shape: int) -> dict[str, Tensor]:
    _, run = causal_in(form)
    inputs = make_inputs(**SHAPES[shape])
    out = run.run(None, {i.name: inputs[i.name].numpy() for i in run.get_inputs()})
    return {name: torch.from_numpy(value) for name, value in zip(CAUSAL, out, strict=True)}


@pytest.mark.parametrize("shape", [0, 1], ids=["as_exported", "other_shape"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CAUSAL)
def test_causal_in_every_form(case: str, form: AttentionForm, shape: int) -> None:
    inputs = make_inputs(**SHAPES[shape])
    want = CASES[case]({name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    torch.testing.assert_close(causal_results(form, shape)[case].double(), want, atol=3e-6, rtol=1e-5)


def test_forms_are_written_as_they_say() -> None:
    for form in FORMS:
        nodes = list(causal_in(form)[0].model.graph)
        attention = [n for n in nodes if n.op_type == "Attention"]
        marked = sum(n.attributes["is_causal"].value for n in attention)
        masked = sum(len(n.inputs) > 3 and n.inputs[3] is not None for n in attention)
        softmax = sum(n.op_type == "Softmax" for n in nodes)
        square, total = 2, len(CAUSAL)  # a rectangle is masked in every form
        wanted = {"causal": (square, total - square, 0), "masked": (0, total, 0), "plain": (0, 0, total)}
        assert (marked, masked, softmax) == wanted[form], form


def test_forms_of_the_attention_op_need_its_opset() -> None:
    for form in ("causal", "masked"):
        with pytest.raises(InputError, match=f"'{form}' needs the Attention op of opset 23, not 18"):
            translation_table(18, form)
    assert translation_table(18, "plain") and translation_table(23, "masked")


@pytest.mark.parametrize("opset", [23, 24])
def test_attention_op_is_used(opset: int) -> None:
    program, _ = exported(opset)
    ops = [node.op_type for node in program.model.graph]
    assert ops.count("Attention") == len(names(opset))
    assert "Softmax" not in ops


def test_causal_attribute_only_where_lengths_are_known_to_be_equal() -> None:
    program, _ = exported(24)
    attention = [node for node in program.model.graph if node.op_type == "Attention"]
    causal = [node for node in attention if node.attributes["is_causal"].value]
    assert len(causal) == sum(name in ("causal", "dynamic_heads_causal") for name in SHORT)
    assert all(len(node.inputs) < 4 or node.inputs[3] is None for node in causal)


def test_rectangular_causal_is_not_bottom_right() -> None:
    """The two alignments differ on these inputs, so that test_against_torch can tell them apart."""
    inputs = make_inputs(**SHAPES[0])
    length, keys = inputs["q"].shape[2], inputs["k"].shape[2]
    bottom_right = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    other = gqa(inputs, attn_mask=bottom_right)
    assert (results(24, 0)["causal_cross"] - other).abs().max() > 0.1


def test_group_order_matters() -> None:
    """Query head i reads KV head i // group; the tiled order differs on these inputs."""
    inputs = make_inputs(**SHAPES[0])
    tiled = sdpa(inputs["q"], inputs["k"].repeat(1, 2, 1, 1), inputs["v"].repeat(1, 2, 1, 1))
    for opset in OPSETS:
        assert (results(opset, 0)["gqa"] - tiled).abs().max() > 0.1


class SelfAttention(nn.Module):
    """Grouped-query attention on ``[batch, seq, width]``, as models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(19, HQ * D), nn.Linear(19, HKV * D)
        self.v, self.o = nn.Linear(19, HKV * DV), nn.Linear(HQ * DV, 19)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, HQ, D).transpose(1, 2)
        k = self.k(x).view(b, s, HKV, D).transpose(1, 2)
        v = self.v(x).view(b, s, HKV, DV).transpose(1, 2)
        y = sdpa(q, k, v, attn_mask=keep[:, None, None, :], enable_gqa=True)
        out: Tensor = self.o(y.transpose(1, 2).reshape(b, s, HQ * DV))
        return out


def self_attention_inputs(b: int, s: int, dtype: torch.dtype = torch.float32) -> Inputs:
    g = torch.Generator().manual_seed(7)
    keep = torch.arange(s) < torch.tensor([s - i for i in range(b)])[:, None]
    return {"x": torch.randn(b, s, 19, generator=g).to(dtype), "keep": keep}


SELF_DYNAMIC = {"x": {0: AUTO, 1: AUTO}, "keep": {0: AUTO, 1: AUTO}}


@pytest.mark.parametrize("opset", [18, 24])
def test_half_precision(opset: int) -> None:
    torch.manual_seed(0)
    module = SelfAttention().eval()
    inputs = self_attention_inputs(3, 11, torch.float16)
    run = session(export(module.half(), inputs, opset))
    got = torch.from_numpy(run.run(None, {name: x.numpy() for name, x in inputs.items()})[0])
    assert got.dtype == torch.float16
    want = module.double()(inputs["x"].double(), inputs["keep"])
    torch.testing.assert_close(got.double(), want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("opset", [18, 24])
def test_double_keeps_its_precision(opset: int) -> None:
    """The scale is irrational: kept as a float32 anywhere, it would cost half of the digits."""
    torch.manual_seed(0)
    module = SelfAttention().double().eval()
    inputs = self_attention_inputs(3, 11, torch.float64)
    run = session(export(module, inputs, opset))
    got = torch.from_numpy(run.run(None, {name: x.numpy() for name, x in inputs.items()})[0])
    torch.testing.assert_close(got, module(**inputs), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("opset", [18, 24])
def test_bfloat16_stays_bfloat16(opset: int) -> None:
    """ONNX Runtime's CPU provider has no bf16 kernels, so only the types are looked at."""
    program = export(SelfAttention().bfloat16(), self_attention_inputs(3, 11, torch.bfloat16), opset)
    core = [n for n in program.model.graph if n.op_type == ("Attention" if opset == 24 else "Softmax")]
    assert len(core) == 1
    assert program.model.graph.outputs[0].dtype.name == "BFLOAT16"
    if opset == 24:
        assert not any(n.op_type == "Cast" and n.attributes["to"].value == 1 for n in program.model.graph)


@cache
def self_attention() -> Any:
    return export(SelfAttention(), self_attention_inputs(3, 11), 24, SELF_DYNAMIC)


def test_transposes_cancel() -> None:
    assert not [n.name for n in self_attention().model.graph if n.op_type == "Transpose"]


def test_enable_gqa_survives_decomposition() -> None:
    """torch.onnx decomposes before it translates, and the default table would turn attention into a softmax."""
    [node] = [n for n in self_attention().model.graph if n.op_type == "Attention"]
    assert (node.attributes["q_num_heads"].value, node.attributes["kv_num_heads"].value) == (HQ, HKV)


@pytest.mark.parametrize("opset", [18, pytest.param(23, marks=pytest.mark.slow), 24])
def test_by_hand(opset: int) -> None:
    """Scores 0 and ln 3 give weights 1/4 and 3/4; the second query sees only the first key."""

    class Hand(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
            return sdpa(q, k, v, attn_mask=keep, scale=1.0)

    inputs = {
        "q": torch.ones(1, 1, 2, 1),
        "k": torch.tensor([0.0, 3.0]).add(torch.tensor([0.0, -3.0 + 1.0986122886681098])).view(1, 1, 2, 1),
        "v": torch.tensor([8.0, 4.0]).view(1, 1, 2, 1),
        "keep": torch.tensor([[True, True], [True, False]]),
    }
    run = session(export(Hand(), inputs, opset))
    out = run.run(None, {name: x.numpy() for name, x in inputs.items()})[0]
    assert out.ravel().tolist() == pytest.approx([8 * 0.25 + 4 * 0.75, 8.0], abs=1e-5)


def test_dropout_is_refused() -> None:
    class Drops(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return sdpa(q, q, q, dropout_p=0.5)

    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        export(Drops(), {"q": torch.randn(2, 3, 5, 7)}, 24)
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    assert cause is not None and "eval()" in str(cause)


def test_old_opset_is_refused() -> None:
    with pytest.raises(InputError, match="18"):
        translation_table(17)
