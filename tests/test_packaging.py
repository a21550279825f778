"""What is on disk, in pyproject.toml, in the wheel and in git agree; and nothing committed belongs to one machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIR: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]

# Model families; the compiler must hold for any model, so it may know none of them.
FAMILIES = (
    "albert|bart|beit|bert|bloom|clip|codegen|deberta|deepseek|deit|electra|falcon|gemma|gpt|hubert|llama|llava|marian"
    "|minilm|mistral|mixtral|mpt|opt-|pegasus|phi[0-9-]|qwen|roberta|stablelm|starcoder|swin|t5|vit|wav2vec|whisper|xlm"
)


def git(*args: str) -> str:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: this looks at the committed files")
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def packages_on_disk() -> set[str]:
    """Dotted names of every folder with an ``__init__.py`` under the mapped folders, symlinks not followed."""
    found = set()
    for top, folder in PACKAGE_DIR.items():
        for path, folders, files in os.walk(ROOT / folder, followlinks=False):
            folders[:] = [name for name in folders if not os.path.islink(os.path.join(path, name))]
            if "__init__.py" in files:
                relative = Path(path).relative_to(ROOT / folder).parts
                found.add(".".join((top, *relative)))
    return found


def test_packages_on_disk_are_the_listed_ones() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert packages_on_disk() == set(listed)
    assert len(listed) == len(set(listed))


def test_wheel_holds_every_package(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, so that the build leaves nothing beside the sources
    ignore = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "*.egg-info", "scratch", "demo-out")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    wheels = tmp_path / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*command, "-w", str(wheels), str(source)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {"sqa_fx/py.typed"}
    for top, folder in PACKAGE_DIR.items():
        for path in (source / folder).rglob("*.py"):
            relative = path.relative_to(source / folder)
            if not any((source / folder / parent).is_symlink() for parent in relative.parents):
                expected.add((Path(*top.split(".")) / relative).as_posix())
    assert inside == expected
    assert {name.partition("/")[0] for name in inside} == {"sqa_fx"}


@pytest.mark.parametrize("name", ["passes", "exporters"])
def test_bare_import_is_refused_with_a_hint(name: str) -> None:
    command = [sys.executable, "-c", f"import {name}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"ImportError: this package was imported as '{name}'" in result.stderr
    assert f"import 'sqa_fx.{name}' instead" in result.stderr


def test_packages_import_from_elsewhere(tmp_path: Path) -> None:
    code = "import sqa_fx.passes as p, sqa_fx.exporters as e; print(p.__name__, e.__name__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["sqa_fx.passes", "sqa_fx.exporters"]


def test_symlinks_are_committed_as_symlinks() -> None:
    for name in ("passes", "exporters"):
        mode, digest, *_ = git("ls-files", "--stage", f"sqa_fx/{name}").split()
        assert mode == "120000"
        assert git("cat-file", "blob", digest) == f"../{name}"


def test_compiler_names_no_model_family() -> None:
    pattern = re.compile(rf"(?<![a-z])({FAMILIES})", re.IGNORECASE)
    sources = sorted((ROOT / "passes").rglob("*.py"))
    assert sources
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_no_committed_file_names_a_path_of_a_machine() -> None:
    # Written in pieces, so that this file does not match itself.
    tops = "|".join(("work", "root", "home", "opt", "Users", "mnt"))
    pattern = re.compile(rf"(?<![\w.:/<>])/(?:{tops})/\w|--(?:extra-)?index-" + "url")
    hits = []
    for name in git("ls-files").splitlines():
        path = ROOT / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image
        hits += [f"{name}:{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    assert not hits, "\n".join(hits)
