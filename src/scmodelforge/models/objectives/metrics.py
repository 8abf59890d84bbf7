"""Metrics of pretraining as sums and counts: added over batches and ranks first, divided last."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from scmodelforge.models.gene_prediction import GenePrediction
from scmodelforge.models.objectives.batch import ModelOutput

GENE_SUMS = ("cross_entropy", "genes", "top1", "top5")
VALUE_SUMS = (
    "squared_error",
    "absolute_error",
    "values",
    "pearson",
    "pearson_cells",
    "spearman",
    "spearman_cells",
)
BIN_SUMS = ("bin_hits", "bin_near", "bins")


def gene_sums(prediction: GenePrediction, genes: torch.Tensor) -> torch.Tensor:
    """float64 (4): `GENE_SUMS` of a prediction (m) for the true tokens (m), some rows of logits at a time."""
    sums = torch.zeros(4, dtype=torch.float64, device=genes.device)
    for logits, truth in prediction.chunks(genes):  # what is beyond `genes` was not asked
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices == truth[:, None]
        cross_entropy = F.cross_entropy(logits, truth, reduction="sum")
        count = cross_entropy.new_tensor(len(truth))
        sums += torch.stack([cross_entropy, count, top5[:, :1].sum(), top5.sum()]).double()
    return sums


def gene_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Perplexity and accuracies."""
    n = sums["genes"]
    return {
        "perplexity": math.exp(min(_mean(sums["cross_entropy"], n), 700.0)),
        "top1_accuracy": _mean(sums["top1"], n),
        "top5_accuracy": _mean(sums["top5"], n),
        "n_asked": n,
    }


def value_sums(
    predicted: torch.Tensor, truth: torch.Tensor, cell: torch.Tensor, n_cells: int
) -> torch.Tensor:
    """float64 (7): `VALUE_SUMS` of predicted and true values (m) of cells `cell` (int64 m).

    Correlations are those of each cell's asked non-zero genes; a cell counts if both sides vary.
    """
    error = (predicted - truth).double()
    expressed = truth > 0
    x, y, cell = predicted[expressed].double(), truth[expressed].double(), cell[expressed]
    pearson = _correlations(x, y, cell, n_cells)
    spearman = _correlations(_ranks(x, cell), _ranks(y, cell), cell, n_cells)
    return torch.stack(
        [
            error.square().sum(),
            error.abs().sum(),
            error.new_tensor(len(error)),
            pearson.nan_to_num(0).sum(),
            pearson.isfinite().sum().double(),
            spearman.nan_to_num(0).sum(),
            spearman.isfinite().sum().double(),
        ]
    )


def value_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Errors, and the mean over cells of the correlations."""
    n = sums["values"]
    return {
        "mse": _mean(sums["squared_error"], n),
        "mae": _mean(sums["absolute_error"], n),
        "pearson": _mean(sums["pearson"], sums["pearson_cells"]),
        "spearman": _mean(sums["spearman"], sums["spearman_cells"]),
        "n_values": n,
    }


def bin_sums(predicted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """float64 (3): `BIN_SUMS`, how often the bin of a non-zero gene is right, and right within one, of how many."""
    distance = (predicted.round() - truth).abs()[truth > 0]
    return torch.stack([(distance == 0).sum(), (distance <= 1).sum(), (truth > 0).sum()]).double()


def bin_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Accuracy of the bin, and within one bin; zeros are not counted, a constant would get them right."""
    n = sums["bins"]
    return {"bin_accuracy": _mean(sums["bin_hits"], n), "bin_accuracy_1": _mean(sums["bin_near"], n)}


def term_sums(output: ModelOutput, names: tuple[str, ...]) -> torch.Tensor:
    """float64 (2 × terms): sum and count of each named loss term."""
    return torch.stack(
        [
            part
            for name in names
            for term in [output.terms[name]]
            for part in (
                term.total.detach().double(),
                torch.as_tensor(term.count, device=term.total.device).double(),
            )
        ]
    )


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")


def _correlations(x: torch.Tensor, y: torch.Tensor, cell: torch.Tensor, n_cells: int) -> torch.Tensor:
    """Pearson correlation within each cell, float64 (n_cells); NaN where a side does not vary."""

    def per_cell(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(n_cells).index_add(0, cell, values)

    n = per_cell(torch.ones_like(x))
    x = x - (per_cell(x) / n)[cell]
    y = y - (per_cell(y) / n)[cell]
    xx, yy = per_cell(x * x), per_cell(y * y)
    varies = (n > 1) & (xx > 1e-12 * n) & (yy > 1e-12 * n)
    return torch.where(varies, per_cell(x * y) / (xx * yy).sqrt(), torch.nan)


def _ranks(values: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    """Rank of each value within its cell, ties averaged, float64 (m)."""
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(cell[order], stable=True)]
    pairs = torch.stack([cell[order].double(), values[order]], dim=1)
    _, tie, size = torch.unique_consecutive(pairs, dim=0, return_inverse=True, return_counts=True)
    last = size.cumsum(0)
    mean_place = (last - (size - 1) / 2.0).double()
    ranks = torch.empty_like(values)
    ranks[order] = mean_place[tie]  # places of the whole batch: an offset per cell, which no correlation sees
    return ranks
