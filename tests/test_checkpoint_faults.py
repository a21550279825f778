"""What goes wrong while a checkpoint is converted: kills, full and read-only disks, damaged and foreign files."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sqa_fx
from sqa_fx.checkpoint_journal import JOURNAL, MANIFEST, locked
from sqa_fx.checkpoint_names import match_names
from sqa_fx.errors import InputError, MissingError, PlanError, SqaError
from sqa_fx.plan import HeadBlock, ParameterPlan, Plan, SitePlan

SHARDS = 8
WIDTH = 512


def cut(name: str, axis: int) -> ParameterPlan:
    """Two of four heads of ``WIDTH / 4``, the second one the mean of two."""
    d = WIDTH // 4
    heads = [(f"{i * d}:{(i + 1) * d}",) for i in range(4)]
    blocks = (HeadBlock("k", 0, heads[0], (heads[2],), (heads[2],)),
              HeadBlock("k", 1, heads[1], (heads[0], heads[3]), (heads[0], heads[3])))  # fmt: skip
    return ParameterPlan(name, axis, (WIDTH, WIDTH // 2), ("s",), blocks, heads[1])


PLAN = Plan(
    (SitePlan("s", 4, 4, 2, 2, WIDTH // 4, (2, 0), ((2,), (0,)), ((2,), (0, 3))),),
    tuple(cut(f"layers.{i}.{name}.weight", axis) for i in range(SHARDS) for name, axis in (("k", 0), ("o", 1))),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    names: dict[str, str] = {}
    for i in range(SHARDS):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        held = {f"layers.{i}.{name}.weight": torch.randn(WIDTH, WIDTH) for name in ("k", "mlp", "o")}
        save_file(held, folder / file, {"format": "pt"})
        names |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def convert(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Converts into ``out``; whatever happens, the input stays as it is."""
    before = digests(checkpoint)

    def call(**options: Any) -> Any:
        return sqa_fx.convert_checkpoint(checkpoint, tmp_path / "out", **{"plan": PLAN, "jobs": 1, **options})

    yield call
    if before:
        assert digests(checkpoint) == before


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_killed_ten_times(checkpoint: Path, tmp_path: Path, convert: Callable[..., Any]) -> None:
    start = time.perf_counter()
    convert(jobs=2)
    took = time.perf_counter() - start
    whole = digests(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    generator, kills, kept, partial = random.Random(5), 0, 0, tmp_path / "out.partial"
    context = multiprocessing.get_context("fork")

    def in_child() -> None:
        torch.set_num_threads(1)  # torch mends its thread pool after a fork, and not if two threads ask for it at once
        convert(jobs=2)

    for _ in range(100):
        process = context.Process(target=in_child)
        process.start()
        process.join(generator.uniform(0, took))
        alive = process.exitcode is None
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        done = (tmp_path / "out").exists()
        # Either it is complete, or it does not carry its name.
        assert not done or (digests(tmp_path / "out") == whole and not partial.exists())
        assert alive or done
        kept += len(list(partial.glob("*.safetensors"))) > 0
        if kills == 10:
            break
        if done:
            shutil.rmtree(tmp_path / "out")
    assert kills == 10 and kept
    report = convert()
    assert digests(tmp_path / "out") == whole
    assert report.shards == SHARDS


def test_resumes_without_redoing(
    checkpoint: Path, tmp_path: Path, convert: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert()
    whole = digests(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        refuse_after(patch, 9 * 10**6)
        with pytest.raises(InputError, match=r"No space left on device; free some space and run the same"):
            convert()
    partial = tmp_path / "out.partial"
    shards = sorted(partial.glob("*.safetensors"))
    assert 3 <= len(shards) < SHARDS and not list(partial.glob("*.tmp")) and not (tmp_path / "out").exists()
    times = {path.name: path.stat().st_mtime_ns for path in shards}
    # One of them was damaged meanwhile: it is written again, alone.
    data = bytearray(shards[0].read_bytes())
    data[-1] ^= 1
    shards[0].write_bytes(data)
    report = convert()
    assert report.shards_kept == len(shards) - 1
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == t for n, t in times.items() if n != shards[0].name)
    assert digests(tmp_path / "out") == whole


def refuse_after(patch: pytest.MonkeyPatch, limit: int) -> None:
    """The disk is full after ``limit`` bytes."""
    written, write = 0, os.write

    def full(file: int, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    patch.setattr("sqa_fx.checkpoint_shard.os.write", full)


def mounted(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=False)
    if done.returncode:
        pytest.skip("a small file system cannot be mounted here")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "small"
    mounted(folder, "size=6m")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(
    checkpoint: Path, small: Path, monkeypatch: pytest.MonkeyPatch, convert: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match=r"the disk is full: 8 shards need 0.02 GB, 0.01 GB are free"):
        sqa_fx.convert_checkpoint(checkpoint, small / "out", plan=PLAN)
    # Somebody else fills it underway.
    usage = shutil.disk_usage(checkpoint)
    monkeypatch.setattr("sqa_fx.checkpoint_run.shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device; free some space"):
        sqa_fx.convert_checkpoint(checkpoint, small / "out", plan=PLAN, jobs=2)
    assert os.listdir(small) == ["out.partial"]
    subprocess.run(["mount", "-o", "remount,size=60m", str(small)], check=True)
    assert sqa_fx.convert_checkpoint(checkpoint, small / "out", plan=PLAN).shards_kept > 0
    sqa_fx.verify_checkpoint(small / "out")


def test_a_target_that_is_read_only(checkpoint: Path, small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(InputError, match=r"Read-only file system; give a directory that you may write"):
        sqa_fx.convert_checkpoint(checkpoint, small / "out", plan=PLAN)


def test_a_write_that_was_not_kept(
    convert: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr("sqa_fx.checkpoint_shard.os.write", lambda file, data: write(file, bytes(len(data))))
    with pytest.raises(InputError, match="is not what was written to it"):
        convert()
    assert not (tmp_path / "out").exists()


def test_damaged_shards(checkpoint: Path, convert: Callable[..., Any], tmp_path: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    for data, message in (
        (whole[:-5], "is truncated: its tensors take 3145728 bytes, it holds 3145723"),
        (whole + b"x", "is longer than its header says"),
        (whole[:4], "holds 4 bytes"),
        (b"\xff" * 8 + whole[8:], "it is truncated, or no safetensors file"),
        (whole[:8] + b"x" + whole[9:], "header is damaged"),
        (whole.replace(b"[512,512]", b"[512,511]", 1), "of shape .* and dtype F32 has 1048576 bytes"),
        (whole.replace(b"[0,1048576]", b"[8,1048576]", 1), "is said to be bytes 8 to"),
    ):
        shard.write_bytes(data)
        with pytest.raises(InputError, match=message):
            convert()
    shard.write_bytes(whole)
    assert not list(tmp_path.glob("out*"))


def test_damaged_indexes(checkpoint: Path, convert: Callable[..., Any], tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors.index.json"
    text = path.read_text()
    index = json.loads(text)
    first = next(iter(index["weight_map"]))
    other = {**index["weight_map"], first: f"model-{SHARDS:05}-of-{SHARDS:05}.safetensors"}
    fewer = {name: file for name, file in index["weight_map"].items() if name != first}
    for content, message in (
        (text[:-9], "is not JSON"),
        ("{}", "no weight_map"),
        (json.dumps({"weight_map": other}), f"{first!r} is not in"),
        (json.dumps({"weight_map": fewer}), f"does not name {first!r}"),
        (json.dumps({"weight_map": {**index["weight_map"], "x": "y.safetensors"}}), "has no y.safetensors"),
        (json.dumps({"weight_map": {"x": "../y.safetensors"}}), "lie beside their index"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            convert()
    path.unlink()
    with pytest.raises(InputError, match=r"holds 8 shards .* and no model.safetensors.index.json"):
        convert()
    path.write_text(text)
    with pytest.raises(MissingError, match="no such directory"):
        sqa_fx.convert_checkpoint(tmp_path / "none", tmp_path / "out", plan=PLAN)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    with pytest.raises(MissingError, match=r"pytorch_model.bin, which would have to be unpickled"):
        sqa_fx.convert_checkpoint(tmp_path / "pickled", tmp_path / "out", plan=PLAN)


def unfinished(convert: Callable[..., Any]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError):
        refuse_after(patch, 9 * 10**6)
        convert()


def test_another_request_or_input(checkpoint: Path, convert: Callable[..., Any], tmp_path: Path) -> None:
    unfinished(convert)
    other = Plan(PLAN.sites, PLAN.parameters[:2])
    with pytest.raises(PlanError, match="give the same options to finish it, or start over"):
        convert(plan=other)
    assert convert(plan=other, restart=True).tensors_cut == 2
    shutil.rmtree(tmp_path / "out")
    unfinished(convert)
    os.utime(next(checkpoint.glob("*.safetensors")))
    with pytest.raises(InputError, match="was begun from other shards"):
        convert()
    shutil.rmtree(tmp_path / "out.partial")
    unfinished(convert)
    (tmp_path / "out.partial" / "sqa_fx_plan.json").write_text("{}")
    with pytest.raises(PlanError, match="was altered"):
        convert()
    (tmp_path / "out.partial" / JOURNAL).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        convert()


def test_places(checkpoint: Path, convert: Callable[..., Any], tmp_path: Path) -> None:
    for target in (checkpoint, checkpoint / "out", tmp_path):
        with pytest.raises(InputError, match="lie in one another"):
            sqa_fx.convert_checkpoint(checkpoint, target, plan=PLAN)
    with pytest.raises(InputError, match="does not exist"):
        sqa_fx.convert_checkpoint(checkpoint, tmp_path / "no" / "out", plan=PLAN)
    (tmp_path / "out").mkdir()
    convert()  # an empty directory may be there
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(InputError, match="not made by convert-checkpoint"):
        convert(overwrite=True)
    shutil.rmtree(tmp_path / "out")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with locked(partial), pytest.raises(InputError, match="being written by another process"):
        convert()
    partial.mkdir(exist_ok=True)
    (partial / "letters.txt").touch()
    with pytest.raises(InputError, match=r"holds letters.txt, which no conversion left there"):
        convert()


def test_altered_results(convert: Callable[..., Any], tmp_path: Path) -> None:
    unfinished(convert)
    with pytest.raises(InputError, match="is not complete"):
        sqa_fx.verify_checkpoint(tmp_path / "out.partial")
    convert()
    shard = next((tmp_path / "out").glob("*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match="SHA-256"):
        sqa_fx.verify_checkpoint(tmp_path / "out")
    shard.write_bytes(data[:-1])
    with pytest.raises(InputError, match="instead of"):
        sqa_fx.verify_checkpoint(tmp_path / "out")
    shard.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        sqa_fx.verify_checkpoint(tmp_path / "out")
    with pytest.raises(MissingError, match="not made by convert-checkpoint"):
        sqa_fx.verify_checkpoint(tmp_path)


def test_a_failure_in_one_of_many(
    checkpoint: Path, convert: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def broken(file: int, buffers: Any, offset: int) -> int:
        if "00003" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, buffers, offset)

    monkeypatch.setattr("sqa_fx.checkpoint_cut.os.preadv", broken)
    with pytest.raises(InputError, match=r"cannot write .*00003.* from .*00003.*: Input/output error"):
        convert(jobs=4)


def test_names() -> None:
    assert match_names(["a.w"], ["a.w", "x.a.w"]) == {"a.w": ["a.w"]}
    assert match_names(["a.w", "b.w"], ["m.a.w", "m.b.w"]) == {"a.w": ["m.a.w"], "b.w": ["m.b.w"]}
    assert match_names(["m.a.w", "m.b.w"], ["a.w", "b.w"]) == {"m.a.w": ["a.w"], "m.b.w": ["b.w"]}
    assert match_names(["a.w"], ["b.w", "a.w"], {"a.w": ["a.w", "b.w"]}) == {"a.w": ["a.w", "b.w"]}
    with pytest.raises(PlanError, match=r"2 tensors that could be parameter 'a.w'"):
        match_names(["a.w"], ["x.a.w", "y.a.w"])
    with pytest.raises(PlanError, match=r"1 of 2 parameters of the plan are not in .*: b.w; .*like a.w, c.w"):
        match_names(["a.w", "b.w"], ["a.w", "c.w"])


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    one = Plan(PLAN.sites, (cut("k.weight", 0),))

    def attempt(held: dict[str, torch.Tensor]) -> SqaError:
        save_file(held, folder / "model.safetensors")
        with pytest.raises(PlanError) as caught:
            sqa_fx.convert_checkpoint(folder, tmp_path / "out", plan=one)
        assert not list(tmp_path.glob("out*"))
        return caught.value

    assert "shape [6, 3], the plan expects 512 entries along axis 0" in str(attempt({"k.weight": torch.zeros(6, 3)}))
    weight = torch.zeros(WIDTH, 4).to(torch.float8_e4m3fn)
    for extra in ("k.weight_scale_inv", "k.weight.absmax", "k.scales"):
        error = attempt({"k.weight": weight, extra: torch.zeros(4, 2)})
        assert f"'k.weight' is quantised: {extra!r} of shape [4, 2]" in str(error)
    save_file({"k.weight": weight, "k.weight_scale": torch.ones(1)}, folder / "model.safetensors")
    sqa_fx.convert_checkpoint(folder, tmp_path / "out", plan=one)  # one scale for all is nobody's head
