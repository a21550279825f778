"""A plain training loop for the small models of the examples: AdamW, linear warm-up, cosine, bf16 on a GPU; a loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

Batch = tuple[Tensor, Tensor]


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [batch, length, vocabulary] against targets [batch, length]."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train(
    model: nn.Module,
    batches: Iterator[Batch],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    lr: float,
    compiled: bool,
) -> float:
    """Train ``model`` in place on (inputs, targets); returns the mean loss of the last tenth of the steps."""
    device = next(model.parameters()).device
    decays = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    warmup = max(1, steps // 20)
    schedule = SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.01, 1.0, warmup), CosineAnnealingLR(optimizer, max(1, steps - warmup), lr * 0.05)],
        [warmup],
    )
    call = torch.compile(model) if compiled else model
    model.train()
    late: list[Tensor] = []
    start = time.perf_counter()
    for step in range(steps):
        x, target = (t.to(device, non_blocking=True) for t in next(batches))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(call(x), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step >= steps - max(1, steps // 10):
            late.append(loss.detach())
        if step % max(1, steps // 5) == 0:
            print(f"  step {step}: loss {float(loss):.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()
    return float(torch.stack(late).mean())
