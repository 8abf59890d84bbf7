"""`training.tokens_per_batch: auto`: the largest token budget that fits into the memory of this machine.

On a GPU steps of growing size are tried. On a CPU, where too much memory ends the process, the formula of `memory.py`
decides, and half of what is free is used. An epoch keeps at least `LEAST_STEPS` steps, so that small data are not
learned in a few huge ones.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from scmodelforge.errors import ConfigError
from scmodelforge.training.memory import (
    activation_bytes,
    available_bytes,
    fits,
    fixed_bytes,
    largest_that_fits,
)
from scmodelforge.training.pretraining import Pretraining, with_budget
from scmodelforge.training.setup import accelerator, n_processes

log = logging.getLogger(__name__)

LEAST_STEPS = 100
SAMPLED_CELLS = 512
START = 16_384
SHARE_OF_FREE_MEMORY = 0.5  # of a CPU's


def with_chosen_budget(run: Pretraining) -> Pretraining:
    """The same run with a number in `training.tokens_per_batch`, which is said; as it is if there is one already.

    Raises
    ------
    UserError
        If several processes would have to choose together, or not even the longest cell fits.
    """
    training = run.bundle.config.training
    if training.tokens_per_batch != "auto":
        return run
    if n_processes(training) > 1:
        raise ConfigError(
            "training.tokens_per_batch: auto is for one process, as each would find a number of its own.\n"
            "'scmodelforge plan' in one process says which number fits: write it into the config."
        )
    rows, store = run.prepared.train_rows, run.prepared.store
    chosen = np.sort(np.random.default_rng(training.seed).permutation(rows)[:SAMPLED_CELLS])
    lengths = run.tokenizer(store.read(chosen), training.seed, 0).lengths.numpy()
    mean, longest = float(lengths.mean()), run.bundle.model.packing.longest
    most = max(round(mean * len(rows) / LEAST_STEPS), longest)

    on_gpu = accelerator(training)[0] == "gpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    fit = fits(lambda n: _step(run, n, mean, device)) if on_gpu else lambda n: _fits_by_formula(run, n)
    budget = largest_that_fits(fit, START, least=longest, most=most)
    log.info(
        "training.tokens_per_batch: auto chose %s tokens, some %s cells a batch.",
        f"{budget:,}",
        f"{budget / mean:,.0f}",
    )
    return replace(run, bundle=replace(run.bundle, config=with_budget(run.bundle.config, budget)))


def _fits_by_formula(run: Pretraining, n_tokens: int) -> bool:
    bundle = run.bundle
    asked = round(n_tokens * bundle.config.tokenizer.masking.mask_ratio)
    if bundle.config.model.architecture_like == "autoregressive_transformer":
        asked = n_tokens
    needed = fixed_bytes(bundle.model) + activation_bytes(bundle.config, bundle.vocab, n_tokens, asked)
    return needed < SHARE_OF_FREE_MEMORY * available_bytes(torch.device("cpu"))


def _step(run: Pretraining, n_tokens: int, mean: float, device: torch.device) -> None:
    """A forward and a backward pass over some `n_tokens` tokens of training cells."""
    training, module = run.bundle.config.training, run.module
    cells = run.prepared.store.read(np.resize(run.prepared.train_rows, max(1, int(n_tokens / mean))))
    batch = run.task.pack(run.task.corrupt(run.tokenizer(cells, training.seed, 0), training.seed, 0))
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(training.precision)
    module.model.to(device).train()
    try:
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            loss = run.task(module.model, batch.to(device)).loss
        loss.backward()
    finally:
        module.model.zero_grad(set_to_none=True)
