"""The examples run at their smallest sizes and leave the files and verdicts that they promise.

They share one process of their own, since most of their time is the import of torch, its exporters and transformers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
MISSING = "3"
COMMON = "--layers 1 --iterations 2"
CONVERSION = f"{COMMON} --no-baseline"
SCRIPTS = {
    "vit": f"convert_vit.py --model vit_tiny_patch16_224 --hq 2 --hkv 1 --batch 1 {CONVERSION}",
    "llm": f"convert_llm.py --variant SQA --width 64 --lengths 16 --tokens 4 {CONVERSION}",
    "diffusion": f"convert_diffusion.py --hq 0.5 --size 8 --head-dim 8 --batch 1 {CONVERSION}",
    "tensorrt": f"export_tensorrt.py --lengths 16 32 {COMMON}",
    "compared": f"compare_engines.py --models bert-base --engines eager onnx --lengths 16 32 {COMMON}",
    "missing": f"convert_diffusion.py {CONVERSION}",
}
# Runs each script as __main__ and prints its exit code; "missing" runs without diffusers.
DRIVER = """
import runpy, sys, traceback
for line in sys.argv[1:]:
    name, script, *options = line.split()
    sys.argv, code = [script, *options], 0
    if name == "missing":
        for module in [m for m in sys.modules if m.partition(".")[0] == "diffusers"]:
            del sys.modules[module]
        sys.modules["diffusers"] = None
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
        code = "raised"
    print(f"<{name} {code}>", flush=True)
    print(f"<{name}>", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(
    "scripts",
    [("vit", "missing"), pytest.param(("llm", "tensorrt", "compared", "diffusion"), marks=pytest.mark.slow)],
)
def test_examples(scripts: Sequence[str], tmp_path: Path) -> None:
    commands = [f"{name} {SCRIPTS[name]} --out {tmp_path / name}" for name in scripts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(FOLDER)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *commands],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    output, errors, skipped = done.stdout, done.stderr, []
    for name in scripts:
        own, code, output = (*re.split(f"<{name} (.*)>\n", output, maxsplit=1), "", "")[:3]
        error, _, errors = errors.partition(f"<{name}>\n")
        if code == MISSING:
            reason = next(line for line in error.splitlines() if line.startswith("error: "))
            assert "pip install" in reason and "Traceback" not in error
            if name != "missing":
                skipped.append(f"{name}: {reason}")
            continue
        assert code == "0" and name != "missing", f"{name} ends with {code!r}\n{own[-3000:]}\n{error[-3000:]}"
        {"tensorrt": _check_engines, "compared": _check_comparison}.get(name, _check_conversion)(tmp_path / name, own)
    if skipped:
        pytest.skip("; ".join(skipped))


def _check_conversion(out: Path, said: str) -> None:
    result = json.loads((out / "result.json").read_text())
    assert result["validation"]["SQA"]["passed"]
    assert result["report"]["proof"]["error"] <= result["report"]["proof"]["tolerance"]
    assert "proved against the masked original" in said
    assert [row["runner"] for row in result["latency"]["eager"]["rows"]] == ["baseline", "SQA"]
    assert (out / "sqa.onnx").is_file() and (out / "sqa.onnx.json").is_file()
    if out.name == "llm":
        assert "the same as by the masked original" in said and "NOT the same" not in said


def _check_engines(out: Path, said: str) -> None:
    for name in ("baseline", "sqa"):
        about = json.loads((out / f"{name}.engine.json").read_text())
        assert about["format"] == "tensorrt-rtx" and about["inputs"][0]["shape"][1]["max"] == 32
        assert (about["plan"] is None) == (name == "baseline")
    if (out / "result.json").is_file():  # there is a GPU: the engines ran
        assert all(v["passed"] for v in json.loads((out / "result.json").read_text())["validation"].values())
    else:
        assert "skipped validation and latency" in said


def _check_comparison(out: Path, said: str) -> None:
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    found = {(row["engine"], row["variant"], row["length"]) for row in rows if "skipped" not in row}
    engines = ("eager", "onnx") if any(engine == "onnx" for engine, _, _ in found) else ("eager",)
    assert found == {(e, v, n) for e in engines for v in ("baseline", "SQA") for n in (16, 32)}
    assert all(row["passed"] and row["speedup"] > 0 for row in rows if "skipped" not in row)
    assert out.with_suffix(".md").is_file() and "bert-base" in said
