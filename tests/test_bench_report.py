"""The bench report as one HTML file and as Markdown."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sqa_fx.bench import BenchReport, BenchRow
from sqa_fx.bench_report import to_html, to_markdown, write_html, write_markdown
from sqa_fx.environment import environment
from sqa_fx.errors import InputError
from sqa_fx.ideal import IdealEntry

EVIL = '</script><script>alert(1)</script>&<img src="http://x/y">|`'


def report_of(name: str = "SQA") -> BenchReport:
    rows = [
        BenchRow("original", "eager", "float32", "2x512", 20, 8.0, 9.0, 10.0, 128.0, 1.0, stable=True),
        BenchRow(name, "eager", "float32", "2x512", 20, 4.0, 5.0, 6.0, 256.0, 0.5, peak_memory_bytes=2**20),
    ]
    entry = IdealEntry(name, "2x512", 6.0, 3.2, 2.5, 0.8)
    return BenchReport(tuple(rows), "CPU", 2, 3, (entry,), {"device": "CPU", "torch": "2.13.0", "libx": name})


VALIDATION: dict[str, Any] = {
    "passed": False,
    "reference_dtype": "float64",
    "notes": ["a <note>"],
    "comparisons": [
        {"candidate": "SQA", "input_set": 0, "max_abs": 0.25, "passed": False, "problem": EVIL, "cosine": None}
    ],
}


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, the text outside of scripts, and the script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text, self.script = "", ""
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        else:
            self.text += data
            if self.open and self.open[-1] in ("td", "th"):
                self.cells[-1] += data


@pytest.fixture(autouse=True)
def _matplotlib(request: pytest.FixtureRequest) -> None:
    if "markdown" not in request.node.name:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def test_page_is_whole_and_stands_alone() -> None:
    page = Page(to_html(report_of(), title="Two models", validation=VALIDATION))
    assert page.open == []
    [image] = [attributes for tag, attributes in page.tags if tag == "img"]
    source = image["src"] or ""
    assert source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.partition(",")[2], validate=True)[:8] == b"\x89PNG\r\n\x1a\n"
    outside = [a for _, attributes in page.tags for a in attributes if a in ("href", "srcset", "data", "action")]
    assert outside == [] and {"link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert "original" in page.cells and "2.00x" in page.cells and "2.50x" in page.cells and "80%" in page.cells
    assert page.cells[page.cells.index("torch") + 1] == "2.13.0"
    assert "SQA on 2x512: times had not settled" in page.text
    assert "FAILED, against the reference in float64" in page.text and "a <note>" in page.text


def test_json_in_the_page_is_the_report() -> None:
    report = report_of(EVIL)
    page = Page(to_html(report, validation=VALIDATION))
    data = json.loads(page.script)
    assert data == {"bench": json.loads(report.to_json()), "validation": VALIDATION}


def test_names_stay_text() -> None:
    page = Page(to_html(report_of(EVIL), title=EVIL, x_label=EVIL, validation=VALIDATION))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert page.cells.count(EVIL) == 3  # the runner, the version of libx, and the problem of the comparison
    assert page.open == []


def test_markdown() -> None:
    lines = to_markdown(report_of(), title="Two models", validation=VALIDATION).splitlines()
    assert lines[0] == "# Two models"
    head = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert head[:4] == ["input", "runner", "kind", "dtype"] and head[-2:] == ["ideal", "share"]
    assert lines[3].count("---") == len(head)
    row = [cell.strip() for cell in lines[5].strip("|").split("|")]
    assert len(row) == len(head)
    assert row[head.index("p50 ms")] == "4.000" and row[head.index("peak MiB")] == "1.0" and row[-1] == "80%"
    assert "| torch | 2.13.0 |" in lines
    assert "FAILED, against the reference in float64" in lines


def test_markdown_of_names_with_signs() -> None:
    text = to_markdown(report_of("a|b\n# *c*"))
    row = next(line for line in text.splitlines() if "4.000" in line)
    assert "| a\\|b \\# \\*c\\* |" in row
    assert "<" not in to_markdown(report_of(EVIL), validation=VALIDATION)


def test_files_are_whole_and_not_replaced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of()
    assert write_html(report, tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert write_markdown(report, tmp_path / "r.md").read_text() == to_markdown(report)
    for write, name in ((write_html, "r.html"), (write_markdown, "r.md")):
        with pytest.raises(InputError, match="overwrite=True"):
            write(report, tmp_path / name)
        with pytest.raises(InputError, match="cannot write in"):
            write(report, tmp_path / "none" / name)
    changed = replace(report, device="GPU <1>")
    write_html(changed, tmp_path / "r.html", overwrite=True)
    assert "GPU &lt;1&gt;" in (tmp_path / "r.html").read_text()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        write_markdown(changed, tmp_path / "r.md", overwrite=True)
    assert (tmp_path / "r.md").read_text() == to_markdown(report)
    assert sorted(os.listdir(tmp_path)) == ["r.html", "r.md"]


def test_markdown_names_the_environment() -> None:
    import torch

    found = environment(None)
    assert found["torch"] == torch.__version__ and found["device"].startswith("CPU")
    assert "driver" not in found and all(found.values())
