"""Models by name: every form loads, and what cannot be loaded says why without running anything."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqa_fx.errors import InputError, MissingError
from sqa_fx.models import load_model

FACTORIES = """
import torch
from torch import nn

module = nn.Linear(3, 5)
number = 3

def plain():
    return nn.Linear(3, 5)

def with_args():
    return nn.Linear(3, 5), (torch.ones(2, 3),)

def with_both():
    return nn.Linear(3, 5), (), {"input": torch.ones(2, 3)}

def text():
    return "model"

class Holder:
    make = staticmethod(plain)
"""


class Touch:
    """Unpickling this makes the file ``pwned``."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5))
        self.tied = self.weight
        self.register_buffer("offset", torch.randn(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight + self.tied).t() + self.get_buffer("offset")[:, None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"factories_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    return tmp_path / name


@pytest.mark.parametrize("attribute", ["plain", "module", "Holder.make"])
def test_factory(folder: Path, attribute: str) -> None:
    loaded = load_model(f"{folder.name}:{attribute}")
    assert isinstance(loaded.module, nn.Linear)
    assert not loaded.module.training
    assert (loaded.args, loaded.kwargs) == (None, None)


def test_factory_with_inputs(folder: Path) -> None:
    loaded = load_model(f"{folder.name}:with_args")
    assert loaded.args is not None and loaded.args[0].shape == (2, 3)
    assert loaded.kwargs == {}
    loaded = load_model(f"{folder.name}:with_both")
    assert loaded.args == ()
    assert loaded.kwargs is not None and loaded.kwargs["input"].shape == (2, 3)


def test_factory_that_makes_no_module(folder: Path) -> None:
    with pytest.raises(InputError, match="returned a str"):
        load_model(f"{folder.name}:text")
    with pytest.raises(InputError, match="is a int"):
        load_model(f"{folder.name}:number")
    with pytest.raises(InputError, match="has no 'nothing'"):
        load_model(f"{folder.name}:nothing")


def test_factory_whose_module_needs_a_library(folder: Path) -> None:
    Path("needy.py").write_text("import a_library_that_is_not_there")
    with pytest.raises(MissingError, match="pip install a_library_that_is_not_there"):
        load_model("needy:make")


@pytest.mark.parametrize("name", ["nothing", "no.module.here:make", "some/folder", ""])
def test_unknown_name_lists_the_forms(name: str) -> None:
    with pytest.raises(InputError, match=r"package\.module:factory(.|\n)*DIRECTORY(.|\n)*timm:NAME(.|\n)*FILE\.pt2"):
        load_model(name)


def test_timm() -> None:
    pytest.importorskip("timm")
    assert isinstance(load_model("timm:test_vit").module, nn.Module)
    with pytest.raises(InputError, match=r"no model 'vit_tiny_patch16_225'; it has .*vit_tiny_patch16_224"):
        load_model("timm:vit_tiny_patch16_225")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=3
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_transformers_directory(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    module = load_model(str(checkpoint)).module
    assert isinstance(module, nn.Module)
    assert not module.training
    stored = load_file(checkpoint / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(module.state_dict()[name], stored[name])


def test_transformers_directory_with_pickle_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(InputError, match=r"pytorch_model\.bin, which would have to be unpickled"):
        load_model(str(checkpoint))
    assert not (checkpoint / "pwned").exists()


def test_transformers_directory_truncated(checkpoint: Path) -> None:
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(checkpoint))


def test_transformers_directory_with_remote_code(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.OwnModel"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match="OwnModel, and code in the folder is not run"):
        load_model(str(checkpoint))


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "scale.pt2"
    ep = torch.export.export(Scale(), (torch.randn(7, 5),))
    torch.export.save(ep, path)
    return path


def replace(path: Path, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None) -> None:
    """Rewrite the entries of a zip file; None drops one."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            changed = change(name, data)
            if changed is not None:
                new.writestr(name, changed)
        for name, data in (extra or {}).items():
            new.writestr(name, data)


def test_archive_is_what_torch_saved(archive: Path) -> None:
    loaded = load_model(str(archive))
    expected = torch.export.load(archive)
    assert isinstance(loaded.module, torch.export.ExportedProgram)
    x = torch.randn(7, 5)
    assert torch.equal(loaded.module.module()(x), expected.module()(x))
    assert loaded.module.state_dict["weight"] is loaded.module.state_dict["tied"]
    assert loaded.args is not None and expected.example_inputs is not None
    assert torch.equal(loaded.args[0], expected.example_inputs[0][0])


def test_archive_with_a_pickled_weight(archive: Path) -> None:
    def change(name: str, data: bytes) -> bytes:
        if name.endswith("model_weights_config.json"):
            config = json.loads(data)
            config["config"]["weight"]["use_pickle"] = True
            return json.dumps(config).encode()
        return pickle.dumps(Touch()) if name.endswith("weights/weight_0") else data

    replace(archive, change)
    with pytest.raises(InputError, match="weight is stored as pickle"):
        load_model(str(archive))
    assert not Path("pwned").exists()


def test_archive_with_an_opaque_constant(archive: Path) -> None:
    def change(name: str, data: bytes) -> bytes:
        if name.endswith("model_constants_config.json"):
            config = json.loads(data)
            row = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            config["config"]["thing"] = row
            return json.dumps(config).encode()
        return data

    replace(archive, change, {"scale/data/constants/opaque_obj_0": pickle.dumps(Touch())})
    with pytest.raises(InputError, match="thing is stored as pickle"):
        load_model(str(archive))
    assert not Path("pwned").exists()


def test_archive_with_malicious_example_inputs(archive: Path) -> None:
    buffer = io.BytesIO()
    torch.save((Touch(), {}), buffer)
    replace(archive, lambda name, data: buffer.getvalue() if "sample_inputs" in name else data)
    with pytest.raises(InputError, match="example inputs are a pickle of more than tensors"):
        load_model(str(archive))
    assert not Path("pwned").exists()


def test_archive_with_legacy_pickled_weights(archive: Path) -> None:
    replace(archive, lambda _, data: data, {"scale/data/weights/model.pt": pickle.dumps(Touch())})
    with pytest.raises(InputError, match="tensors are stored as pickle"):
        load_model(str(archive))
    assert not Path("pwned").exists()


def test_archive_with_code_in_its_guards_or_targets(archive: Path) -> None:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        value: dict[str, Any] = json.loads(data)
        value["guards_code"] = ["__import__('os').system('touch pwned')"]
        return json.dumps(value).encode()

    replace(archive, change)
    loaded = load_model(str(archive)).module
    assert isinstance(loaded, torch.export.ExportedProgram)
    loaded.module()(torch.randn(7, 5))
    assert not Path("pwned").exists()

    def target(name: str, data: bytes) -> bytes:
        return data.replace(b"torch.ops.aten.mul.Tensor", b"torch.hub.load")

    replace(archive, target)
    with pytest.raises(InputError, match=r"'torch\.hub\.load' is not an operator"):
        load_model(str(archive))


def test_archive_truncated_or_foreign(archive: Path) -> None:
    data = archive.read_bytes()
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="truncated"):
        load_model(str(archive))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(InputError, match=r"holds no models/model\.json"):
        load_model(str(archive))
    with pytest.raises(InputError, match="No such file"):
        load_model("missing.pt2")
