"""Which backends work here: a small real computation in each, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sqa_fx.doctor_probes import MARK, PROBES
from sqa_fx.errors import InputError
from sqa_fx.text_table import text_table

BACKENDS = tuple(PROBES)
DEFAULT_TIMEOUT = 120.0
"""Seconds that one probe may take; compiling takes most of them on a busy machine."""

Status = Literal["usable", "importable", "missing", "broken"]
_LONGEST = 300
_PATIENCE = 5.0


@dataclass(frozen=True)
class Finding:
    """What is true of one backend.

    ``status``: "usable" (it computed something, rightly), "importable" (it is installed, but cannot run here),
    "missing", or "broken" (its probe crashed, hung, failed or answered nonsense). ``detail`` has the device or the
    reason, ``fix`` the command that helps.
    """

    backend: str
    status: Status
    detail: str
    fix: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class DoctorReport:
    """The findings, in the order of the backends asked for."""

    findings: tuple[Finding, ...]

    def __getitem__(self, backend: str) -> Finding:
        return {f.backend: f for f in self.findings}[backend]

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps({"version": 1, "backends": [asdict(f) for f in self.findings]}, indent=2, allow_nan=False)

    def table(self) -> str:
        """The report as aligned text, with the commands that help below it."""
        head = ["backend", "status", "versions", "detail"]
        rows = [
            [f.backend, f.status, " ".join(f"{k} {v}" for k, v in f.versions.items()) or "-", f.detail]
            for f in self.findings
        ]
        return "\n".join([text_table(head, rows), *(f"fix {f.backend}: {f.fix}" for f in self.findings if f.fix)])


def diagnose(
    backends: Sequence[str] = BACKENDS,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    workers: int = 2,
    commands: Mapping[str, Sequence[str]] | None = None,
) -> DoctorReport:
    """Probe each of ``backends``, ``workers`` at a time, each for at most ``timeout`` seconds.

    A probe that crashes, hangs or prints nonsense is a finding and harms nothing else. ``commands`` replaces the probe
    of a backend, or adds one. Raises InputError for a backend without a probe, and for limits that are not positive.
    """
    known = {name: [sys.executable, "-m", "sqa_fx.doctor_probes", name] for name in BACKENDS}
    known |= {name: list(command) for name, command in (commands or {}).items()}
    unknown = [name for name in backends if name not in known]
    if unknown:
        raise InputError(f"no such backend: {', '.join(unknown)}; there are {', '.join(known)}")
    if timeout <= 0 or workers < 1:
        raise InputError(f"timeout is {timeout} and workers is {workers}; give positive numbers")
    probes = [_Probe(name, known[name], timeout) for name in backends]
    pool = ThreadPoolExecutor(workers)
    try:
        return DoctorReport(tuple(pool.map(_Probe.finding, probes)))
    except BaseException:
        for probe in probes:  # Ctrl-C must not wait for a probe that hangs
            probe.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Probe:
    """One command, and what became of it."""

    def __init__(self, backend: str, command: list[str], timeout: float) -> None:
        self.backend, self.command, self.timeout = backend, command, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def finding(self) -> Finding:
        started = time.perf_counter()
        # Files, not pipes: a compiler that outlives the probe would keep a pipe open.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                with self._lock:
                    if self._stopped:
                        return self._broken("not run", started)
                    process = self._process = subprocess.Popen(
                        self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                    )
            except OSError as e:
                return self._broken(f"cannot start: {e}", started)
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return self._broken(f"hangs: no answer within {self.timeout:g} s{_said(_text(err))}", started)
            finally:
                self.stop()
            return self._read(code, _text(out), _text(err), started)

    def stop(self) -> None:
        """End the process and whatever it started, and start nothing any more."""
        with self._lock:
            self._stopped = True
            if self._process is None:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it is gone already
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver; it ends when that lets go
                self._process.wait(_PATIENCE)
            self._process = None  # its number may soon be that of another process

    def _read(self, code: int, out: str, err: str, started: float) -> Finding:
        if code < 0:
            return self._broken(f"crashes: killed by {_signal(-code)}{_said(err)}", started)
        if code > 0:
            return self._broken(f"fails with exit code {code}{_said(err or out)}", started)
        answers = [line.removeprefix(MARK) for line in out.splitlines() if line.startswith(MARK)]
        try:
            content = json.loads(answers[-1])
            return self._found(content, started)
        except (IndexError, ValueError, TypeError, KeyError):
            return self._broken(f"gives no answer that can be read{_said(out)}", started)

    def _found(self, content: Any, started: float) -> Finding:
        status, detail, fix, versions = (content[key] for key in ("status", "detail", "fix", "versions"))
        if status not in ("usable", "importable", "missing", "broken") or not isinstance(detail, str):
            raise ValueError(f"status {status!r}")
        if not isinstance(fix, str | None) or not isinstance(versions, dict):
            raise TypeError(f"fix {fix!r}, versions {versions!r}")
        return Finding(self.backend, status, detail, fix, versions, time.perf_counter() - started)

    def _broken(self, detail: str, started: float) -> Finding:
        return Finding(self.backend, "broken", detail, seconds=time.perf_counter() - started)


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def _said(output: str) -> str:
    """The last line of the output, to end a sentence with: where Python puts the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return f"; its last line: {lines[-1][:_LONGEST]}" if lines else ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
