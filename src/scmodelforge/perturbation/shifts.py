"""What perturbations do to cells in the eyes of a model: perturbed cells beside their originals, in large batches.

Three measures, as in Geneformer. With states: how much closer the perturbed cell is to the mean embedding of each state
than the original is. Without: how unlike itself the cell becomes, by the contextual embeddings of the genes that were
not perturbed, or by `<cls>` where that is the cell's embedding. It costs a forward pass for each perturbed cell, and
one for each original; the variants of many cells share batches of a fixed number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from scmodelforge.data.batch import REPEAT
from scmodelforge.inference_batches import FittingBatches, some_cells
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.perturbation.choice import Choice
from scmodelforge.perturbation.variants import Layout, delete, n_overflow, overexpress, shorten
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import PackedTokens

BATCHES_AT_ONCE = 4  # perturbed cells that are made at once


class PerturbedCells:
    """Compares perturbed cells with their originals.

    Parameters
    ----------
    bundle
        The model.
    overexpressed
        Genes are overexpressed; else deleted.
    states
        float64 (n_states, width): embeddings of the states to measure shifts to; None: similarity to the original.
    pooling, device, precision
        As of `CellTransformer.encode` and `compute_cells`.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        overexpressed: bool,
        states: np.ndarray | None,
        pooling: str,
        device: str,
        precision: str,
    ) -> None:
        self.model = model = bundle.model.to(device).eval()
        self.layout, self.n_tokens = Layout.of(bundle.config, bundle.vocab), bundle.vocab.n_tokens
        self.overexpressed = overexpressed
        self.states = None if states is None else torch.from_numpy(states).to(device)
        self.by_genes = states is None and pooling != "cls"
        self.cells = FittingBatches(lambda tokens: model.encode(tokens, pooling), model, device, precision)
        self.tokens = FittingBatches(model.embedded_tokens, model, device, precision)

    def __call__(self, tokens: TokenBatch, choice: Choice) -> Iterator[np.ndarray]:
        """Yield the shifts of cells, on the CPU, under the perturbations of `choice`, some of these at a time.

        float64 (n_variants, n_measures); n_measures is the number of states; without any it is 1, and the shift is one
        minus the cosine similarity to the original.
        """
        at_once = max(BATCHES_AT_ONCE * self.cells.budget // tokens.input_ids.shape[1], 1)
        for first in range(0, len(choice.cell), at_once):
            cell, genes = (each[first : first + at_once] for each in (choice.cell, choice.genes))
            yield self._shifts(some_cells(tokens, torch.from_numpy(cell)), cell, genes).cpu().numpy()

    def _shifts(self, unperturbed: TokenBatch, cell: np.ndarray, genes: np.ndarray) -> torch.Tensor:
        """As `__call__`, of one row a variant: the cell before, and the genes (n, k) that are perturbed."""
        if self.overexpressed:
            perturbed = overexpress(unperturbed, genes, self.layout)
            lost = n_overflow(unperturbed, genes, self.layout)
        else:
            perturbed, lost = delete(unperturbed, genes, self.layout), np.zeros(len(cell), dtype=np.int64)
        distinct, original = _distinct(cell, lost)
        originals = shorten(some_cells(unperturbed, torch.from_numpy(distinct)), lost[distinct], self.layout)
        if self.by_genes:
            return self._by_genes(originals, perturbed, original, genes)
        before, after = self.cells(originals).double(), self.cells(perturbed).double()
        of = torch.from_numpy(original).to(before.device)
        if self.states is None:
            return 1 - F.cosine_similarity(after, before[of])[:, None]
        return _cosines(after, self.states) - _cosines(before, self.states)[of]

    def _by_genes(
        self, originals: TokenBatch, perturbed: TokenBatch, original: np.ndarray, genes: np.ndarray
    ) -> torch.Tensor:
        """float64 (n, 1): one minus the mean cosine similarity of the genes that were not perturbed."""
        packed, n_tokens = self.model.readable(originals), self.n_tokens
        keys, order = torch.sort((packed.cell * n_tokens + packed.input_ids)[packed.positions >= 0])
        self.tokens.compute = lambda tokens: self.model.embedded_tokens(tokens)[tokens.positions >= 0]
        before = self.tokens(originals)
        device = before.device
        keys, order, of = keys.to(device), order.to(device), torch.from_numpy(original).to(device)
        unlike = torch.from_numpy(genes).to(device)

        def compute(tokens: PackedTokens) -> torch.Tensor:
            variant = tokens.cell_index[tokens.cell] // REPEAT
            key = of[variant] * n_tokens + tokens.input_ids
            place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
            counted = (tokens.positions >= 0) & (tokens.input_ids >= self.layout.first_gene_token)
            counted &= keys[place] == key
            counted &= (tokens.input_ids[:, None] != unlike[variant]).all(dim=1)
            similar = F.cosine_similarity(
                self.model.embedded_tokens(tokens).double(), before[order[place]].double()
            )
            similar = similar.where(counted, 0)
            total = similar.new_zeros(tokens.n_cells).index_add(0, tokens.cell, similar)
            n_counted = similar.new_zeros(tokens.n_cells).index_add(0, tokens.cell, counted.double())
            return (1 - total / n_counted)[:, None]

        self.tokens.compute = compute
        return self.tokens(_numbered(perturbed))


def _distinct(cell: np.ndarray, lost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A variant of each original that differs from the others, and the original of each variant (int64)."""
    _, first, original = np.unique(np.stack([cell, lost]), axis=1, return_index=True, return_inverse=True)
    return first, original.ravel()


def _numbered(tokens: TokenBatch) -> TokenBatch:
    """The same, with the row in the batch above `REPEAT` in `cell_index`, so that parts of the batch know it."""
    return replace(tokens, cell_index=tokens.cell_index % REPEAT + REPEAT * torch.arange(tokens.n_cells))


def _cosines(embeddings: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """float64 (n, n_states): cosine similarities."""
    return F.cosine_similarity(embeddings[:, None], states[None], dim=-1)
