"""diagnose: what the real probes say here, and that no probe can harm the process that asks."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sqa_fx import doctor_probes
from sqa_fx.doctor import BACKENDS, DoctorReport, Finding, diagnose
from sqa_fx.doctor_probes import MARK
from sqa_fx.errors import InputError


def probe(code: str, timeout: float = 30.0) -> Finding:
    """What is found of a backend whose probe is this Python code."""
    report = diagnose(["it"], timeout=timeout, commands={"it": [sys.executable, "-c", code]})
    return report["it"]


def answer(**changes: object) -> str:
    content = {"status": "usable", "detail": "here", "fix": None, "versions": {"it": "1.2"}, **changes}
    return f"{MARK}{json.dumps(content)}"


@pytest.fixture(scope="module")
def real() -> DoctorReport:
    return diagnose(["eager", "onnxruntime", "tensorrt-rtx", "torch-tensorrt"], timeout=240)


def test_eager_is_usable(real: DoctorReport) -> None:
    found = real["eager"]
    assert (found.status, found.fix) == ("usable", None)
    assert found.versions == {"torch": torch.__version__} and found.detail.startswith("CPU")
    assert found.seconds > 0


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
@pytest.mark.slow
def test_a_torch_without_cuda_is_told() -> None:
    real = diagnose(["cuda"], timeout=240)
    assert real["cuda"].status == "missing" and "without CUDA" in real["cuda"].detail
    assert real["cuda"].fix is not None and real["cuda"].fix.startswith("pip install")


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_onnxruntime_is_usable(real: DoctorReport) -> None:
    assert (real["onnxruntime"].status, real["onnxruntime"].detail) == ("usable", "CPU")


@pytest.mark.skipif(find_spec("torch_tensorrt") is not None, reason="torch_tensorrt is installed")
def test_torch_tensorrt_is_missing(real: DoctorReport) -> None:
    found = real["torch-tensorrt"]
    assert (found.status, found.detail) == ("missing", "torch_tensorrt is not installed")
    assert found.fix is not None and found.fix.startswith("pip install 'torch_tensorrt==")


@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tensorrt_rtx_builds_without_a_gpu(real: DoctorReport) -> None:
    assert real["tensorrt-rtx"].status == "importable"
    assert "bytes for SM89" in real["tensorrt-rtx"].detail


def test_report(real: DoctorReport) -> None:
    table = real.table()
    assert table.splitlines()[0].split() == ["backend", "status", "versions", "detail"]
    content = json.loads(real.to_json())
    assert [b["backend"] for b in content["backends"]] == [f.backend for f in real.findings]
    for found in real.findings:
        assert (f"fix {found.backend}: {found.fix}" in table) == (found.fix is not None)


def test_an_answer_is_found_among_noise() -> None:
    found = probe(f"print('loading'); print({answer(status='missing', fix='pip install it')!r}); print('bye')")
    assert (found.status, found.detail, found.fix, found.versions) == (
        "missing",
        "here",
        "pip install it",
        {"it": "1.2"},
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.abort()", "crashes: killed by SIGABRT"),
        ("import os; os.kill(os.getpid(), 11)", "crashes: killed by SIGSEGV"),
        (f"import os; print({answer()!r}, flush=True); os.kill(os.getpid(), 8)", "crashes: killed by SIGFPE"),
        ("assert False, 'needs CUDA'", "exit code 1; its last line: AssertionError: needs CUDA"),
        (
            "raise OSError('libcuda.so.1: cannot open')",
            "exit code 1; its last line: OSError: libcuda.so.1: cannot open",
        ),
        ("raise SystemExit(3)", "exit code 3"),
        ("pass", "no answer that can be read"),
        ("print('hello')", "no answer that can be read; its last line: hello"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)) * 100)", "no answer that can be read"),
        (f"print({MARK!r} + '{{]')", "no answer that can be read"),
        (f"print({MARK!r} + '[1]')", "no answer that can be read"),
        (f"print({answer(status='splendid')!r})", "no answer that can be read"),
        (f"print({answer(versions=3)!r})", "no answer that can be read"),
    ],
)
def test_what_goes_wrong_is_told(code: str, message: str) -> None:
    found = probe(code)
    assert found.status == "broken"
    assert message in found.detail


def test_a_hang_is_ended_with_all_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(file)!r}, 'w').write(str(child.pid)); print('waiting', file=sys.stderr, flush=True);"
        "time.sleep(600)"
    )
    started = time.perf_counter()
    found = probe(code, timeout=5)
    assert time.perf_counter() - started < 60
    assert found.status == "broken"
    assert found.detail == "hangs: no answer within 5 s; its last line: waiting"
    assert _is_gone(int(file.read_text()))


def _is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # dead; whoever adopted it has not looked yet
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_one_bad_probe_does_not_spoil_the_others() -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    commands = {
        "crash": python("import os; os.abort()"),
        "absent": ["/no/such/program"],
        "hang": python("import time; time.sleep(600)"),
        "fine": python(f"print({answer()!r})"),
    }
    report = diagnose(list(commands), timeout=5, commands=commands)
    assert [(f.backend, f.status) for f in report.findings] == [
        ("crash", "broken"),
        ("absent", "broken"),
        ("hang", "broken"),
        ("fine", "usable"),
    ]
    assert report["absent"].detail.startswith("cannot start: ")


@pytest.mark.parametrize(
    ("error", "words"), [("AssertionError('no CUDA')", "no CUDA"), ("OSError('a\\nb')", "OSError: b")]
)
def test_a_torch_tensorrt_that_does_not_import_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, words: str
) -> None:
    (tmp_path / "torch_tensorrt.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    found = doctor_probes.PROBES["torch-tensorrt"]()
    assert found.status == "broken" and words in found.detail
    assert found.fix is not None and "pip install" in found.fix


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="no such backend: eagre; there are eager, cuda"):
        diagnose(["eagre"])
    with pytest.raises(InputError, match="positive"):
        diagnose(["eager"], timeout=0)
    with pytest.raises(InputError, match="positive"):
        diagnose(["eager"], workers=0)
    assert doctor_probes.main(["eagre"]) == 2 and BACKENDS[0] == "eager"
