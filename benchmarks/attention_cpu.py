"""How fast and how exact is attention in bfloat16 on a CPU, by our products, against torch's kernel?

Both compute the same operator, `attend_each`: ours as it is, the peer with products switched off, which is torch's
kernel with all threads, one cell after the other. Cells have other lengths in each round, as in training: what is
prepared for one shape does not help the next. Errors are relative to float32, in percent.

    python benchmarks/attention_cpu.py
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from harness import Row, medians, options, report, versions

from scmodelforge.models import attention_cpu

CELLS = ((64, 20, 60), (64, 60, 130), (64, 130, 260), (32, 500, 700), (12, 500, 1200), (4, 2000, 2048))
HEADS = ((4, 32), (4, 64))


def made(n: int, shortest: int, longest: int, *heads: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k and v (total, heads, width) of `n` cells, and where these begin."""
    ends = torch.cat([torch.zeros(1), torch.randint(shortest, longest, (n,)).cumsum(0)]).int()
    return [torch.randn(int(ends[-1]), *heads).bfloat16() for _ in range(3)], ends


def attend(qkv: list[torch.Tensor], ends: torch.Tensor, products: bool) -> tuple[torch.Tensor, float, float]:
    """The output, and the seconds that it and its gradients took."""
    names = () if products else ("is_worth_products", "has_gradients_by_products")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(attention_cpu, name, lambda *_: False))
        moments = [time.perf_counter()]
        out, _ = attention_cpu.attend_each(*qkv, ends, ends, False, qkv[0].shape[-1] ** -0.5)
        moments.append(time.perf_counter())
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype))
        moments.append(time.perf_counter())
    return out.detach(), moments[1] - moments[0], moments[2] - moments[1]


def seconds(cells: tuple[int, ...], products: bool, backward: bool) -> float:
    """Seconds of one way over new cells."""
    qkv, ends = made(*cells)
    return attend([x.requires_grad_() for x in qkv], ends, products)[2 if backward else 1]


def results(cells: tuple[int, ...], dtype: torch.dtype, products: bool) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v of the same cells."""
    torch.manual_seed(0)
    qkv, ends = made(*cells)
    parts = [x.to(dtype).requires_grad_() for x in qkv]
    out, *_ = attend(parts, ends, products)
    return [out, *(x.grad for x in parts if x.grad is not None)]


def main() -> None:
    """Print the table."""
    asked = options(__doc__)
    rows = []
    for cells in ((*cells, *heads) for heads in HEADS for cells in CELLS):
        name = "{} cells of {} to {} tokens, {} × {}: ".format(*cells)
        for way in ("forward", "backward"):
            runs = {str(ours): partial(seconds, cells, ours, way == "backward") for ours in (True, False)}
            medians(runs, 1)  # without what is prepared once
            found = medians(runs, asked.rounds)
            rows.append(Row(name + way, found["True"] * 1e3, "ms", found["False"] * 1e3))
        exact, ours, theirs = (
            results(cells, *how)
            for how in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False))
        )
        for what, *parts in zip(("output", "of q", "of k", "of v"), exact, ours, theirs, strict=True):
            errors = [float((part - parts[0]).norm() / parts[0].norm()) * 100 for part in parts[1:]]
            rows.append(Row(f"{name}error {what}", errors[0], "%", errors[1]))
    report("attention in bfloat16 on a CPU", rows, versions(), asked.json)


if __name__ == "__main__":
    main()
