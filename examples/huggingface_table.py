"""Which architectures say SQA in their config: small random models, converted, exported to="huggingface", loaded again.

    python examples/huggingface_table.py --output examples/results/huggingface

A row says how the directory loads, which fields of the config changed, how far the loaded model is from the converted
graph, and what was found of greedy generation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measured_rows import fact_lines

import sqa_fx
from sqa_fx.environment import environment
from sqa_fx.torchvision_ops import make_torchvision_importable

TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {name: TEXT[name] for name in list(TEXT)[:4]}
SPEECH: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 10}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": 5}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**TEXT, "head_dim": 10}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, "head_dim": 10, "query_pre_attn_scalar": 12}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "head_dim": 10, "sliding_window": 5}),
    "BERT": ("BertModel", "BertConfig", {**ENCODER, "vocab_size": 97}),
    "ViT": ("ViTModel", "ViTConfig", {**ENCODER, "image_size": 32, "patch_size": 8}),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SPEECH),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 97,
            "d_model": 48,
            "d_kv": 6,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 8,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 48, "n_layer": 2, "n_head": 8, "vocab_size": 97}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", TEXT),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", TEXT),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **TEXT,
            "num_key_value_heads": 8,
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 10,
            "first_k_dense_replace": 2,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "Mixtral (mixture of experts)": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Bamba (attention and state-space)": (
        "BambaForCausalLM",
        "BambaConfig",
        {
            **TEXT,
            "attn_layer_indices": [1],
            "mamba_n_heads": 12,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
}


def measure(name: str) -> dict[str, Any]:
    """Convert, export and load one model."""
    import transformers

    cls, config, fields = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**fields)).eval()
    start = time.perf_counter()
    try:
        converted = sqa_fx.convert(model, hq=0.5, hkv=0.5)
        with tempfile.TemporaryDirectory() as folder:
            artifact = sqa_fx.export(converted, Path(folder) / "out", to="huggingface")
    except sqa_fx.SqaError as error:
        return {"model": name, "class": cls, "loads": "failed", "why": str(error).splitlines()[0]}
    verdict = artifact.sidecar.validation or {}
    why = next((n.removeprefix("not native: ") for n in artifact.sidecar.notes if n.startswith("not native: ")), None)
    return {
        "model": name,
        "class": cls,
        "heads": sorted({f"{s.heads}/{s.kv_heads} -> {s.hq}/{s.hkv}" for s in converted.plan.sites}),
        "loads": {"native": "natively", "surgery": "sqa_fx.from_pretrained", "graph": "as a graph"}[verdict["form"]],
        "fields": verdict["fields"],
        "error": verdict.get("error"),
        "own_error": verdict.get("own_error"),
        "sizes": verdict.get("sizes"),
        "generated": verdict.get("generated"),
        "why": why,
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Directories in the Hugging Face layout",
        "",
        "Small models with random weights, 8 query heads made 4 and half of the KV heads kept, exported by "
        '`sqa_fx.export(..., to="huggingface")` and loaded again; made by `examples/huggingface_table.py`. The error '
        "is the largest difference to the converted graph in float64, relative to the largest output, with random "
        "weights that make scores of ordinary size.",
        "",
        fact_lines(facts),
        "",
        "| model | loads | config | error | generation | not native because |",
        "|---|---|---|---:|---|---|",
    ]
    for row in rows:
        fields = ", ".join(f"`{n}={v}`" for n, v in (row.get("fields") or {}).items())
        error = "" if row.get("error") is None else f"{row['error']:.1e}"
        said = row.get("generated") or ""
        lines.append(f"| {row['model']} | {row['loads']} | {fields} | {error} | {said} | {row.get('why') or ''} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every model, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    make_torchvision_importable()
    import transformers

    facts = {**environment(None), "transformers": transformers.__version__}
    rows = []
    for name in options.models:
        rows.append(measure(name))
        print(json.dumps(rows[-1]), flush=True)
        if options.output is not None:
            options.output.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(table(rows, facts))


if __name__ == "__main__":
    main()
