"""How much memory a training step takes, by formula and measured, and the largest batch that fits.

Three parts: what does not depend on the batch (weights, gradients, two moments of Adam: 16 bytes a trained parameter),
what autograd keeps for the backward pass (a fixed number of bytes a token, as no attention matrix is stored), and the
logits of some of the asked genes, which are largest where the loss is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from scmodelforge.config import Config
from scmodelforge.config_model import ModelConfig
from scmodelforge.errors import UserError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.gene_prediction import ROWS_ON_GPU
from scmodelforge.models.masked_autoencoder import decoder_config

FLOAT = 4  # bytes
LOGIT_COPIES = 2  # logits and their log-softmax live at the same time, for some rows


def fixed_bytes(model: nn.Module) -> int:
    """Weights, and of what trains the gradient and two moments; all float32."""
    return sum(p.numel() * FLOAT * (4 if p.requires_grad else 1) for p in model.parameters())


def activation_bytes(config: Config, vocab: GeneVocab, tokens: int, asked: int) -> int:
    """What a training step keeps for its backward pass, and the logits at their peak.

    Parameters
    ----------
    config, vocab
        Sizes and precision.
    tokens
        Tokens that are computed on, padding included.
    asked
        Asked genes.
    """
    model, half = config.model, config.training.precision != "32-true"
    causal = model.architecture_like == "autoregressive_transformer"
    generates = causal and model.task_like == "expression_reconstruction"
    n = tokens + (asked if generates else 0)
    passes = 2 if generates and model.objective.second_pass_weight else 1
    total = passes * n * _bytes_of_blocks(model, half)
    if model.architecture_like == "masked_autoencoder":
        total += (tokens + asked) * _bytes_of_blocks(decoder_config(model), half)
    names_genes = model.task_like in ("masked_gene_prediction", "dual_prediction", "next_gene")
    if names_genes and model.objective.gene_weight > 0:
        product = 2 if half else FLOAT
        # Gradients of states and output matrix, computed beside the loss, and the rows of logits that live at once.
        total += asked * 3 * model.hidden_dim * product + vocab.n_tokens * model.hidden_dim * FLOAT
        total += min(asked, ROWS_ON_GPU) * vocab.n_tokens * FLOAT * LOGIT_COPIES
    return total


def _bytes_of_blocks(model: ModelConfig, half: bool) -> int:
    """Bytes a token that all blocks keep.

    Of each: the input of both norms (float32), then the inputs of the projections, q, k, v, the mixed values and what
    the feed-forward layer reads (in the precision of the products), and one byte an element of a dropout mask.
    """
    width, inner = model.hidden_dim, model.feed_forward_dim
    product = 2 if half else FLOAT
    block = 2 * width * FLOAT + (6 * width + 2 * inner) * product + 2 * width * (model.dropout > 0)
    embedding = 3 * width * FLOAT
    return model.num_layers * block + embedding


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Run a forward pass and add up what autograd keeps of it, each storage once and without those of `module`."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # held, so that no storage is given to the next tensor
    del result
    return sum(kept.values())


def available_bytes(device: torch.device) -> int:
    """Memory that a run could have: all of the GPU that is free, or what the system could hand out."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        limits = [int(line.split()[1]) * 1024, *_limit_of_the_container()]
        return min(limits)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limit_of_the_container() -> list[int]:
    """What control groups leave to this container, if they limit it."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = (folder / "memory.current").read_text().strip()
    except OSError:  # none, or the first version of control groups
        return []
    return [] if limit == "max" else [int(limit) - int(used)]


def fits(try_step: Callable[[int], None]) -> Callable[[int], bool]:
    """Whether a step of so many tokens runs on the GPU, by running it."""

    def runs(tokens: int) -> bool:
        try:
            try_step(tokens)
        except torch.OutOfMemoryError:
            return False
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return True

    return runs


def largest_that_fits(
    fit: Callable[[int], bool], start: int, *, least: int, most: int, multiple: int = 1024
) -> int:
    """The largest token budget for which `fit` is true, to within an eighth of itself.

    Doubled from `start` while it fits, halved while it does not, then narrowed down between the two.

    Parameters
    ----------
    fit
        Whether so many tokens fit: `fits(try_step)` on a GPU; on a CPU, where too much memory ends the process, an
        estimate by `activation_bytes` against `available_bytes`.
    start
        First budget to try.
    least
        Tokens of the longest cell: less is of no use.
    most
        Tokens of all cells: more is of no use.
    multiple
        What lies between two tried budgets is rounded down to a multiple of it.

    Raises
    ------
    UserError
        If not even `least` tokens fit.
    """
    good = bad = min(max(start, least), most)
    if fit(good):
        while (bad := min(2 * good, most)) > good and fit(bad):
            good = bad
    else:
        while not fit(good := max(bad // 2, least)):
            if good == least:
                raise UserError(
                    f"A batch of {least:,} tokens, the longest cell alone, does not fit into memory. Use a smaller "
                    "model or tokenizer.max_genes, or training.precision bf16-mixed."
                )
            bad = good
    while (middle := (good + bad) // 2 // multiple * multiple) > good + good // 16:
        good, bad = (middle, bad) if fit(middle) else (good, middle)
    return good
