"""The examples run at their smallest sizes, in processes of their own, and leave the files and verdicts promised.

The three conversions share one process, since most of their time is the import of torch and transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MISSING = 3
CONVERSIONS = {
    "convert_vit.py": ["--model", "vit_tiny_patch16_224", "--hq", "2", "--hkv", "1", "--batch", "1"],
    "convert_llm.py": ["--variant", "SQA", "--width", "64", "--lengths", "16", "--tokens", "4"],
    "convert_diffusion.py": ["--hq", "0.5", "--size", "8", "--head-dim", "8", "--batch", "1"],
}
# Runs each script as __main__ and prints its exit code.
DRIVER = """
import json, runpy, sys
for script, options in json.loads(sys.argv[1]).items():
    sys.argv, code = [script, *options], 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    print("exit code of", script, code, flush=True)
"""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python in the examples folder, so that the scripts find each other; on one core, without network."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "examples")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT / "examples",
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_conversions(tmp_path: Path) -> None:
    common = ["--layers", "1", "--iterations", "2", "--no-baseline", "--out"]
    scripts = {name: [*options, *common, str(tmp_path / name)] for name, options in CONVERSIONS.items()}
    done = _run("-c", DRIVER, json.dumps(scripts))
    for name in scripts:
        code = next((s.split()[-1] for s in done.stdout.splitlines() if s.startswith(f"exit code of {name}")), None)
        if code == str(MISSING):
            continue
        assert code == "0", f"{name}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["validation"]["SQA"]["passed"]
        proof = result["report"]["proof"]
        assert proof["error"] <= proof["tolerance"]
        assert [row["runner"] for row in result["latency"]["eager"]["rows"]] == ["baseline", "SQA"]
        assert (tmp_path / name / "sqa.onnx").is_file() and (tmp_path / name / "sqa.onnx.json").is_file()
    if "convert_llm.py 0" in done.stdout:
        assert "the same as by the masked original" in done.stdout and "NOT the same" not in done.stdout
    if missing := [line for line in done.stderr.splitlines() if line.startswith("error: ")]:
        pytest.skip("; ".join(missing))


def test_tensorrt(tmp_path: Path) -> None:
    done = _run(
        "export_tensorrt.py", "--layers", "1", "--lengths", "16", "32", "--iterations", "2", "--out", str(tmp_path)
    )
    if done.returncode == MISSING:
        assert "pip install" in done.stderr
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("baseline", "sqa"):
        about = json.loads((tmp_path / f"{name}.engine.json").read_text())
        assert about["format"] == "tensorrt-rtx" and about["inputs"][0]["shape"][1]["max"] == 32
        assert (about["plan"] is None) == (name == "baseline")
    if (tmp_path / "result.json").is_file():  # a GPU: the engines ran
        verdicts = json.loads((tmp_path / "result.json").read_text())["validation"]
        assert all(report["passed"] for report in verdicts.values())
    else:
        assert "skipped validation and latency" in done.stdout


def test_a_missing_library_is_said_with_its_pip_line(tmp_path: Path) -> None:
    (tmp_path / "diffusers.py").write_text("raise ImportError('hidden by a test')\n")
    code = f"import sys, runpy; sys.path[:0] = [{str(tmp_path)!r}, '.']; sys.argv = ['x', '--out', {str(tmp_path)!r}]; "
    done = _run("-c", code + "runpy.run_path('convert_diffusion.py', run_name='__main__')")
    assert done.returncode == MISSING and "pip install diffusers" in done.stderr and "Traceback" not in done.stderr


def test_engines_are_compared(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = "--models bert-base --engines eager onnx --lengths 16 32 --layers 1 --iterations 2 --out".split()
    done = _run("compare_engines.py", *options, str(tmp_path / "compared"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "compared.json").read_text())["rows"]
    found = {(row["engine"], row["variant"], row["length"]) for row in rows}
    assert found >= {(e, v, n) for e in ("eager", "onnx") for v in ("baseline", "SQA") for n in (16, 32)}
    assert all(row["passed"] and row["speedup"] > 0 for row in rows)
    assert (tmp_path / "compared.md").is_file()
