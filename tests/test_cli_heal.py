"""``sqa-fx heal`` and ``sqa-fx evaluate`` on a small model and a text file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sqa_fx
from sqa_fx.cli import main

MODEL = '''
import torch
from torch import nn


class Model(nn.Module):
    """Next byte from bytes."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, 24), nn.Linear(24, 256)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"logits": self.head(x + 3 * self.o(y.transpose(1, 2).flatten(2)))}


def make():
    torch.manual_seed(3)
    return Model(), (), {"input_ids": torch.zeros(2, 8, dtype=torch.long)}


def small():
    model = make()[0]
    model.embedding = nn.Embedding(90, 24)
    return model
'''


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved conversion."""
    folder = tmp_path_factory.mktemp("conversion")
    (folder / "bytes_to_convert.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        assert main(["convert", "bytes_to_convert:make", "--hq", "2", "--hkv", "2", "-o", str(folder / "student")]) == 0
    return folder / "student"


@pytest.fixture
def case(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Arguments of a command for a conversion in ``student``, on a text file; the current folder is a fresh one."""
    module = f"bytes_{abs(hash(tmp_path))}"
    (tmp_path / f"{module}.py").write_text(MODEL)
    shutil.copytree(student, tmp_path / "student")
    (tmp_path / "text.txt").write_text("the cat sat on the mat, the dog sat on the log; " * 12)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def arguments(command: str, *more: str, teacher: str = "make", data: str = "text.txt") -> list[str]:
        models = [command, "student", "--teacher", f"{module}:{teacher}", "--data", data, "--device", "cpu"]
        return [*models, "--tokenizer", "bytes", "--sequence", "8", "--batch", "4", *more]

    return arguments


def test_heal_and_evaluate(case: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--steps", "30", "--lr", "3e-3", "--warmup", "3", "--evaluate-every", "10", "--site-warmup", "2"]
    stored = ["--checkpoints", "checkpoints", "--log", "log.jsonl"]
    capsys.readouterr()
    assert main(case("evaluate", "--json")) == 0
    before = json.loads(capsys.readouterr().out)
    assert main(case("heal", "-o", "healed", *quick, *stored)) == 0
    out = capsys.readouterr().out
    assert "saved to healed" in out and "held-out top-1 agreement" in out
    healed = sqa_fx.load("healed")
    assert not torch.equal(healed.get_parameter("q.weight"), sqa_fx.load("student").get_parameter("q.weight"))
    after_arguments = case("evaluate", "--json")
    after_arguments[1] = "healed"
    assert main(after_arguments) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["kind"] == "lm" and after["teacher"] == before["teacher"]
    assert after["between"]["top-1 agreement"] > before["between"]["top-1 agreement"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    # Again: the run is finished, so that its checkpoint is the answer.
    assert main(case("heal", "-o", "again", *quick, *stored, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["resumed_from"] == 30
    again = sqa_fx.load("again")
    assert all(torch.equal(p, healed.get_parameter(n)) for n, p in again.named_parameters())


@pytest.mark.parametrize(
    ("more", "code", "match"),
    [
        (("--steps", "0"), 2, "steps is 0"),
        (("--batch", "400"), 2, "smaller --batch"),
        (("-o", "student"), 2, "exists"),
        (("--held-out", "nowhere"), 3, "no data"),
        (("--lr", "1e30", "--warmup", "0", "--steps", "5"), 1, "lower lr"),
        (("--device", "cuda:77"), 3, "no device"),
    ],
)
def test_mistakes_are_told(
    more: tuple[str, ...], code: int, match: str, case: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = () if "-o" in more else ("-o", "healed")
    assert main(case("heal", *output, *more)) == code
    assert match in capsys.readouterr().err and not Path("healed").exists()


def test_other_models_are_told(case: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(case("evaluate", teacher="small")) == 2
    assert "the model knows 0 to 89" in capsys.readouterr().err
    arguments = case("evaluate")
    arguments[1] = arguments[3]
    assert main(arguments) == 2
    assert "no conversion" in capsys.readouterr().err
