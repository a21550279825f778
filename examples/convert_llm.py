"""A Llama with fewer heads: convert, prove, generate, export the prefill to ONNX, validate and measure it.

    python examples/convert_llm.py [--variant SQA | --hq 4 --hkv 2] [--heads 8] [--kv-heads 4] [--lengths 64 256]

Random weights from a config, so the text means nothing. What is shown: greedy decoding over converted graphs, with
their smaller KV caches, gives the tokens of the masked original, the same model with its dropped heads silenced.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from example_steps import arguments, convert, device_and_dtype, ending, export_and_compare, heads, library

import sqa_fx
from sqa_fx.passes.verify import masked_tensor


def llama(options: argparse.Namespace, small: bool) -> Any:
    """A LlamaForCausalLM with random weights."""
    transformers = library("transformers", "pip install transformers")
    config = transformers.LlamaConfig(
        vocab_size=1000 if small else 32000,
        hidden_size=options.width or (256 if small else 2048),
        intermediate_size=3 * (options.width or (256 if small else 2048)),
        num_hidden_layers=options.layers or (2 if small else 8),
        num_attention_heads=options.heads or (8 if small else 32),
        num_key_value_heads=options.kv_heads or (4 if small else 8),
        max_position_embeddings=max(2048, *options.lengths),
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def same_tokens(model: Any, prompt: torch.Tensor, options: argparse.Namespace) -> bool:
    """Whether greedy decoding over converted graphs gives the tokens of the masked original."""
    fast = sqa_fx.convert_for_generation(model, **heads(options), kwargs={"input_ids": prompt})
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for cut in fast.sqa_forms.plan.parameters:
            weight = masked.get_parameter(cut.name)
            weight.copy_(masked_tensor(weight, cut))
    settings: dict[str, Any] = {"max_new_tokens": options.tokens, "do_sample": False}
    settings["attention_mask"] = torch.ones_like(prompt)
    got, expected = (m.generate(prompt, **settings) for m in (fast, masked))
    same = bool(torch.equal(got, expected))
    verdict = "the same" if same else "NOT the same"
    print(f"\ngreedy decoding of {options.tokens} tokens with KV caches: {verdict} as by the masked original")
    return same


def run(options: argparse.Namespace) -> bool:
    """The whole example; whether tokens and ONNX files are right."""
    device, dtype = device_and_dtype()
    options.lengths = options.lengths or ([64, 256] if device == "cpu" else [1024, 4096])
    torch.manual_seed(0)
    model = llama(options, small=device == "cpu").to(device)
    vocabulary = model.config.vocab_size

    def call(batch: int, length: int) -> dict[str, Any]:
        return {"input_ids": torch.randint(1, vocabulary, (batch, length), device=device), "use_cache": False}

    # In float32, where two tokens are hardly ever so close that rounding decides between them.
    same = same_tokens(model, call(2, 8)["input_ids"], options)
    model = model.to(dtype)
    converted = convert(model, options, kwargs=call(2, 16))
    sets: dict[str, Any] = {f"prefill {n}": ((), call(1, n)) for n in options.lengths}
    return export_and_compare(model, converted, sets, options, options.lengths) and same


def main() -> int:
    """Read the command line and run."""
    parser = arguments(__doc__, "llm-out")
    for name in ("width", "heads", "kv-heads"):
        parser.add_argument(f"--{name}", type=int, help=f"{name} of the model (default: small without a GPU)")
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt lengths to measure")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to decode (default: 16)")
    return ending(run, parser)


if __name__ == "__main__":
    sys.exit(main())
