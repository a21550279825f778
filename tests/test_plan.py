"""The plan as data: JSON, ranges, damage, and how requests become head counts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sqa_fx.errors import InputError, MissingError, PlanError, SqaError
from sqa_fx.plan import FORMAT, VERSION, HeadBlock, ParameterPlan, Plan, SitePlan, from_ranges, to_ranges
from sqa_fx.request import VARIANTS, check_patterns, resolve, rounding

PLAN = Plan(
    sites=(
        SitePlan(
            name="layers.0.attention",
            heads=6,
            kv_heads=6,
            hq=2,
            hkv=1,
            head_dim=5,
            query_heads=(1, 4),
            query_groups=((1,), (4,)),
            kv_groups=((1, 4),),
            heads_by="explicit",
            kv_merge="mean",
        ),
    ),
    parameters=(
        ParameterPlan(
            "layers.0.attention.k.weight",
            0,
            (30, 5),
            ("layers.0.attention",),
            (HeadBlock("k", 0, ("0:5",), (("5:10",), ("20:25",)), (("5:10",), ("20:25",))),),
            ("0:5", "10:20", "25:30"),
        ),
        ParameterPlan(
            "layers.0.attention.o.weight",
            1,
            (30, 10),
            ("layers.0.attention",),
            (
                HeadBlock("o", 0, ("0:5",), (("5:10",),), (("5:10",),)),
                HeadBlock("o", 1, ("5:10",), (("20:25",),), (("20:25",),)),
            ),
            ("0:5", "10:20", "25:30"),
        ),
    ),
)


def test_json_round_trip_loses_nothing() -> None:
    text = json.dumps(PLAN.to_json())
    assert Plan.from_json(json.loads(text)) == PLAN
    data = json.loads(text)
    assert (data["format"], data["version"]) == (FORMAT, VERSION)
    assert set(data["sites"][0]) == {
        "name",
        "heads",
        "kv_heads",
        "hq",
        "hkv",
        "head_dim",
        "query_heads",
        "query_groups",
        "kv_groups",
        "heads_by",
        "kv_merge",
    }
    assert set(data["parameters"][0]) == {"name", "axis", "size", "sites", "blocks", "dropped"}
    assert data["parameters"][0]["blocks"][0] == {
        "role": "k",
        "head": 0,
        "to": ["0:5"],
        "from": [["5:10"], ["20:25"]],
        "replaces": [["5:10"], ["20:25"]],
    }


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(InputError, match="exists"):
        PLAN.save(path)
    PLAN.save(path, overwrite=True)
    with pytest.raises(InputError):
        PLAN.save(tmp_path / "nowhere" / "plan.json")
    with pytest.raises((InputError, MissingError)):
        Plan.load(tmp_path / "absent.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"format": "other"}', "\x00\x01"])
def test_foreign_files_are_plan_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(SqaError):
        Plan.load(path)


def test_truncated_files_are_errors_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    whole = path.read_text().rstrip()
    for length in range(0, len(whole), 7):
        path.write_text(whole[:length])
        with pytest.raises(PlanError):
            Plan.load(path)


def test_other_versions_are_refused() -> None:
    for version in (VERSION + 1, 0, None, "1"):
        with pytest.raises(PlanError, match="version"):
            Plan.from_json({**PLAN.to_json(), "version": version})


def _damage(path: list[Any], value: Any) -> Any:
    data = copy.deepcopy(PLAN.to_json())
    place: Any = data
    for step in path[:-1]:
        place = place[step]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["sites"], KeyError),
        (["sites"], 3),
        (["parameters"], KeyError),
        (["sites", 0, "heads"], KeyError),
        (["sites", 0, "heads"], "6"),
        (["sites", 0, "hq"], 2.0),
        (["sites", 0, "hq"], 3),
        (["sites", 0, "hkv"], 2),
        (["sites", 0, "query_heads"], "14"),
        (["sites", 0, "kv_groups"], [1, 4]),
        (["sites", 0, "kv_groups"], [[True]]),
        (["parameters", 0, "blocks"], KeyError),
        (["parameters", 0, "blocks"], []),
        (["parameters", 0, "size"], [30]),
        (["parameters", 0, "size"], [30, 6]),
        (["parameters", 0, "blocks", 0, "to"], ["0:4"]),
        (["parameters", 0, "blocks", 0, "to"], ["a:b"]),
        (["parameters", 0, "blocks", 0, "from"], []),
        (["parameters", 0, "blocks", 0, "from"], [["5:10"], ["20:24"]]),
        (["parameters", 0, "blocks", 0, "from"], [["5:10"], ["-5:0"]]),
        (["parameters", 0, "blocks", 0, "from"], [["5:10"], ["28:33"]]),
        (["parameters", 0, "blocks", 0, "replaces"], [["5:9"]]),
        (["parameters", 1, "blocks", 1, "to"], ["0:5"]),
        (["parameters", 0, "dropped"], ["x"]),
    ],
)
def test_damaged_plans_are_plan_errors(path: list[Any], value: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(_damage(path, value))


@pytest.mark.parametrize(
    ("indices", "ranges"),
    [
        ([], ()),
        ([4], ("4:5",)),
        ([0, 1, 2], ("0:3",)),
        ([0, 1, 2, 8, 10, 12], ("0:3", "8:13:2")),
        ([5, 4, 3], ("5:6", "4:5", "3:4")),
        ([7, 7], ("7:8", "7:8")),
        ([0, 3, 6, 7, 8], ("0:7:3", "7:9")),
    ],
)
def test_ranges(indices: list[int], ranges: tuple[str, ...]) -> None:
    assert to_ranges(indices) == ranges
    assert from_ranges(ranges) == indices


def test_any_indices_survive_as_ranges() -> None:
    state = 12345
    for length in range(40):
        indices = []
        for _ in range(length):
            state = state * 1103515245 % 2**31
            indices.append(state // 65536 % 23)
        assert from_ranges(to_ranges(indices)) == indices


@pytest.mark.parametrize("text", ["", "3", "1:2:3:4", "a:b", "-1:2", "1:5:0", ":4"])
def test_malformed_ranges(text: str) -> None:
    with pytest.raises(PlanError):
        from_ranges([text])


# (heads, kv_heads, hq asked, hkv asked) -> (hq, hkv), worked out by hand for H = 8, 12 and GQA.
TABLE = [
    (8, 8, "SQA", None, (4, 2)),
    (8, 8, "sSQA", None, (4, 4)),
    (8, 8, "xSQA", None, (2, 2)),
    (8, 8, "xSMQA", None, (2, 1)),
    (8, 8, "lSQA", None, (6, 2)),
    (8, 8, "rSQA", None, (2, 4)),
    (12, 12, "SQA", None, (6, 3)),
    (12, 12, "lSQA", None, (9, 3)),
    (12, 12, "lSQA", 1, (9, 1)),
    (8, 4, "SQA", None, (4, 2)),
    (8, 4, "sSQA", None, (4, 4)),
    (16, 2, "SQA", None, (8, 2)),
    (8, 8, "SQA", 1, (4, 1)),
    (8, 8, "SQA", 0.5, (4, 4)),
    (8, 8, 6, 3, (6, 3)),
    (8, 8, 6, None, (6, 6)),
    (8, 2, 4, None, (4, 2)),
    (8, 8, 0.5, 0.25, (4, 2)),
    (8, 4, 0.5, 0.5, (4, 2)),
    (8, 4, 1.0, 1.0, (8, 4)),
    (8, 8, 0.75, 0.375, (6, 3)),
    (12, 12, 1 / 3, 1 / 3, (4, 4)),
    (8, 8, None, 2, (8, 2)),
    (8, 8, 2, 4, (2, 4)),
    (8, 8, 1, 1, (1, 1)),
    (6, 6, 0.25, None, (2, 2)),
    (6, 6, "xSQA", None, (2, 2)),
    (3, 3, 0.5, 0.5, (2, 2)),
    (5, 5, 0.5, 0.25, (3, 1)),
    (15, 5, 0.5, 0.5, (8, 2)),
    (9, 3, 0.5, None, (5, 1)),
    (1, 1, 0.5, 0.5, (1, 1)),
    (7, 7, "SQA", None, (4, 2)),
]


@pytest.mark.parametrize(("heads", "kv_heads", "hq", "hkv", "expected"), TABLE)
def test_requests_by_hand(heads: int, kv_heads: int, hq: Any, hkv: Any, expected: tuple[int, int]) -> None:
    assert resolve("site", heads, kv_heads, hq, hkv) == expected


def test_rounding_says_what_it_did() -> None:
    assert rounding("a", 8, 4, 0.5, 0.5) == "" and rounding("a", 8, 8, 4, 2) == ""
    assert rounding("a", 9, 3, 0.5, 0.5) == (
        "site 'a' has 9 query heads and 3 KV heads: the request comes to 4.5 query heads and 1.5 KV heads, made 5 and 1"
    )
    assert rounding("a", 8, 8, {"b": 0.5}, None) == ""


def test_the_variants_are_the_papers() -> None:
    assert set(VARIANTS) == {"SQA", "sSQA", "xSQA", "xSMQA", "lSQA", "rSQA"}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "hq", "hkv", "words"),
    [
        (6, 6, 4, 3, "divide"),
        (6, 6, 7, None, "between"),
        (6, 6, 0, None, "between"),
        (6, 6, -2, None, "between"),
        (6, 3, 6, 6, "between"),
        (6, 6, 1.5, None, "fraction"),
        (6, 6, 0.0, None, "fraction"),
        (6, 6, float("nan"), None, "fraction"),
        (6, 6, "nosuch", None, "unknown variant"),
        (6, 6, "sqa", None, "unknown variant"),
        (6, 6, 3, "SQA", "variant"),
        (6, 6, True, None, "not a number"),
        (6, 6, [3], None, "not a number"),
    ],
)
def test_impossible_requests_say_why(heads: int, kv_heads: int, hq: Any, hkv: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        resolve("blocks.1", heads, kv_heads, hq, hkv)


def test_impossible_counts_name_site_and_heads() -> None:
    with pytest.raises(PlanError, match=r"'blocks\.1' has 6 query heads and 3 KV heads"):
        resolve("blocks.1", 6, 3, 4, 3)


def test_patterns() -> None:
    assert resolve("layers.3.attention", 8, 8, {"layers.3.*": 4, "*": 2}, None) == (4, 4)
    assert resolve("layers.4.attention", 8, 8, {"layers.3.*": 4, "*": 2}, None) == (2, 2)
    assert resolve("layers.4.attention", 8, 8, {"layers.3.*": 4}, None) is None
    assert resolve("layers.4.attention", 8, 8, {"layers.3.*": 4}, {"*.attention": 2}) == (8, 2)
    assert resolve("a[0]", 8, 8, {"a[0]": 4}, None) == (4, 4)
    check_patterns({"layers.*": 4}, ["layers.0"], "hq")
    with pytest.raises(PlanError, match=r"'decoder\.\*'.*layers\.0, layers\.1"):
        check_patterns({"decoder.*": 4}, ["layers.0", "layers.1"], "hq")
