"""What the paper measured, as data: seconds per step on an A100, and loss and accuracy of trained models.

Source: arXiv 2510.01817, and docs/research/sparse_query_attention.md of RxAI-dev/RxNN for the same figures by variant.
The model is `paper_model.DenseModel`. A step is taken to be a forward pass: forward and backward at 200k tokens would
be more FLOPs of attention with heads of 16 in 2.87 s than an A100 has ever been seen to do (200 TFLOP/s).
"""

from __future__ import annotations

LENGTHS = (1024, 4096, 32768, 131072, 200000)
"""Tokens in a sequence."""
BATCHES = {1024: 128, 4096: 32, 32768: 4, 131072: 1, 200000: 1}
"""Sequences in a batch."""

SECONDS = {
    "MHA": (0.0869, 0.1114, 0.3727, 1.2648, 2.8734),
    "GQA": (0.0785, 0.1027, 0.3637, 1.2558, 2.8596),
    "MQA": (0.0760, 0.1001, 0.3612, 1.2530, 2.8555),
    "sSQA": (0.0669, 0.0793, 0.2117, 0.6630, 1.4824),
    "SQA": (0.0642, 0.0750, 0.1991, 0.6308, 1.4116),
    "xSQA": (0.0570, 0.0637, 0.1348, 0.3759, 0.8194),
}
"""Seconds per step on one A100 40GB by variant, in the order of `LENGTHS`; other variants were not measured."""

VALIDATION = {
    "MHA": (1.1976, 0.7735),
    "GQA": (1.2177, 0.7712),
    "MQA": (1.2497, 0.7664),
    "sSQA": (1.2201, 0.7705),
    "SQA": (1.2272, 0.7697),
    "xSQA": (1.2428, 0.7674),
    "xSMQA": (1.2815, 0.7622),
}
"""Validation loss and accuracy after one epoch of half of the English Wikipedia."""


def seconds(variant: str, length: int) -> float | None:
    """The paper's seconds per step; None where it gives none."""
    if variant not in SECONDS or length not in LENGTHS:
        return None
    return SECONDS[variant][LENGTHS.index(length)]


def speedup(variant: str, length: int) -> float | None:
    """The paper's speed-up over MHA; None where it gives none."""
    own, base = seconds(variant, length), seconds("MHA", length)
    return None if own is None or base is None else base / own
