"""How fast do cells become tokens, and tokens questions?

Synthetic cells in memory (20,120 genes, 1,640 counts a cell on average), batches of 64, one thread. Ours against plain
code that handles one cell after the other with numpy and collates with torch, as the published tokenizers and
collators do; both give the same tokens, which is checked first.

    python benchmarks/tokenizing.py --json tokenizing.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import numpy as np
import torch

BATCH, BATCHES, COUNTS_PER_CELL, LENGTH, SECONDS = 64, 8, 1640, 2048, 2.0
MASK_RATIO = 0.15
STAGES = ("rank", "mask", "bins")


def config_of(stage: str) -> Any:
    """The config of a stage."""
    from scmodelforge.config import Config

    binned = stage == "bins"
    return Config.model_validate(
        {
            "tokenizer": {"strategy": "binned_expression" if binned else "rank_value", "max_genes": LENGTH},
            "model": {
                "pretraining_task": "expression_reconstruction" if binned else "masked_gene_prediction"
            },
        }
    )


def some_cells() -> tuple[Any, list[Any]]:
    """A vocabulary with medians, and batches of cells."""
    from scmodelforge.data.batch import CellBatch
    from scmodelforge.genes.vocab import predefined

    rng = np.random.default_rng(0)
    vocab = predefined("human_protein_coding")
    vocab = vocab.with_medians(rng.uniform(0.5, 20, vocab.n_genes))
    batches = []
    for batch in range(BATCHES):
        lengths = rng.integers(COUNTS_PER_CELL // 2, 3 * COUNTS_PER_CELL // 2, BATCH)
        genes = [np.sort(rng.choice(vocab.n_genes, n, replace=False)) for n in lengths]
        counts = rng.geometric(0.5, int(lengths.sum())).astype(np.float32)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        library = np.add.reduceat(counts, indptr[:-1]).astype(np.float32)
        rows = np.arange(batch * BATCH, (batch + 1) * BATCH)
        batches.append(CellBatch(indptr, np.concatenate(genes).astype(np.int32), counts, library, rows))
    return vocab, batches


def plain_rank(cells: Any, vocab: Any) -> torch.Tensor:
    """Cell after cell: normalize, divide by medians, sort, cut, pad."""
    rows = []
    for i in range(cells.n_cells):
        entries = slice(cells.indptr[i], cells.indptr[i + 1])
        genes = cells.gene_ids[entries]
        counts = cells.counts[entries].astype(np.float64)
        scaled = counts * (1.0 / np.float64(cells.library_size[i])) * 10_000 * (1.0 / vocab.medians[genes])
        tokens = genes[np.argsort(-scaled, kind="stable")][: LENGTH - 1] + vocab.first_gene_token
        rows.append(torch.from_numpy(np.concatenate([[vocab.cls_id], tokens])))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=vocab.pad_id)


def plain_mask(tokens: torch.Tensor, vocab: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking over the whole padded batch, as the collator of transformers draws it."""
    labels, shown = tokens.clone(), tokens.clone()
    probability = torch.full(labels.shape, MASK_RATIO)
    probability.masked_fill_(tokens < vocab.first_gene_token, 0.0)
    asked = torch.bernoulli(probability).bool()
    labels[~asked] = -100
    masked = torch.bernoulli(torch.full(labels.shape, 0.8)).bool() & asked
    shown[masked] = vocab.mask_id
    replaced = torch.bernoulli(torch.full(labels.shape, 0.5)).bool() & asked & ~masked
    shown[replaced] = torch.randint(vocab.n_tokens, labels.shape)[replaced]
    return shown, labels


def plain_bins(cells: Any, vocab: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cell after cell: log-normalize, quantile edges, digitize from both sides, draw between, sample, pad."""
    ids, values = [], []
    for i in range(cells.n_cells):
        entries = slice(cells.indptr[i], cells.indptr[i + 1])
        genes = cells.gene_ids[entries]
        x = np.log1p(cells.counts[entries].astype(np.float64) / cells.library_size[i] * 10_000)
        edges = np.quantile(x, np.linspace(0, 1, 50))
        left, right = np.digitize(x, edges), np.digitize(x, edges, right=True)
        bins = np.ceil(np.random.rand(len(x)) * (right - left) + left)  # noqa: NPY002
        if len(genes) > LENGTH - 1:
            kept = np.random.permutation(len(genes))[: LENGTH - 1]  # noqa: NPY002
            genes, bins = genes[kept], bins[kept]
        ids.append(torch.from_numpy(np.concatenate([[vocab.cls_id], genes + vocab.first_gene_token])))
        values.append(torch.from_numpy(np.concatenate([[0.0], bins]).astype(np.float32)))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=vocab.pad_id), pad(values, batch_first=True)


def rate(work: Callable[[int], Any]) -> float:
    """Cells/s of one thread, after a warm-up."""
    torch.set_num_threads(1)
    for batch in range(BATCHES):
        work(batch)
    n, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        work(n % BATCHES)
        n += 1
    return n * BATCH / (time.perf_counter() - started)


def ours(stage: str) -> float:
    """Our tokenizer, or our masking of its tokens."""
    from scmodelforge.models.objectives import build_objective
    from scmodelforge.tokenizers.base import build_tokenizer

    vocab, batches = some_cells()
    config = config_of(stage)
    tokenizer, objective = build_tokenizer(config, vocab), build_objective(config, vocab)
    if stage == "mask":
        tokens = [tokenizer(cells, 0, 0) for cells in batches]
        return rate(lambda i: objective.corrupt(tokens[i], 0, 0))
    return rate(lambda i: tokenizer(batches[i], 0, 0))


def plain(stage: str) -> float:
    """The plain code of the same stage."""
    vocab, batches = some_cells()
    if stage == "mask":
        tokens = [plain_rank(cells, vocab) for cells in batches]
        return rate(lambda i: plain_mask(tokens[i], vocab))
    work = plain_rank if stage == "rank" else plain_bins
    return rate(lambda i: work(batches[i], vocab))


def require_equal_tokens() -> None:
    """Ranks are the same; bins lie between the edges of the plain code (draws differ)."""
    from scmodelforge.tokenizers.base import build_tokenizer

    vocab, batches = some_cells()
    ranks = build_tokenizer(config_of("rank"), vocab)(batches[0]).input_ids
    if not torch.equal(ranks, plain_rank(batches[0], vocab)):
        raise SystemExit("Ranks differ from those of the plain code: no figure is worth anything.")
    short = np.flatnonzero(batches[0].n_genes_per_cell < LENGTH)[:20]
    one, other = build_tokenizer(config_of("bins"), vocab)(batches[0]), plain_bins(batches[0], vocab)
    if not torch.equal(one.input_ids[short], other[0][short]):
        raise SystemExit("Genes differ from those of the plain code: no figure is worth anything.")
    if abs(float(one.values[short].mean() - other[1][short].mean())) > 0.5:
        raise SystemExit("Bins differ from those of the plain code: no figure is worth anything.")


def main() -> None:
    """Measure and print."""
    options = harness.options(__doc__)
    require_equal_tokens()
    runs: dict[str, Callable[[], float]] = {}
    for stage in STAGES:
        runs[stage] = partial(harness.fresh, ours, stage=stage)
        runs[f"plain {stage}"] = partial(harness.fresh, plain, stage=stage)
    rates = harness.medians(runs, options.rounds)
    rows = [harness.Row(stage, rates[stage], "cells/s", rates[f"plain {stage}"]) for stage in STAGES]
    title = f"tokenizing, one thread, {LENGTH:,} tokens; peer: one cell after the other"
    harness.report(title, rows, harness.versions("numba"), options.json)


if __name__ == "__main__":
    main()
