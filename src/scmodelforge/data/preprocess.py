"""Statistics of the training cells: gene medians, empty cells, highly variable genes.

Medians are exact and need bounded memory, whatever the number of cells: a first pass counts each gene's
values in coarse bins of the logarithm, further passes (one, or two for many cells) look only into the bin
where the middle value lies. It is a radix selection: the bits of a positive float ascend with its value.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import anndata as ad
import numpy as np
from scipy import sparse

from scmodelforge.config import HighlyVariableGenes, Preprocessing
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.order import permutation
from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError

logger = logging.getLogger(__name__)

BLOCK_CELLS = 512
BINS = 512  # per gene; in the first pass 16 an octave from 2**-16 to 2**16, the outer two open
BIN_BITS = 9
FIRST_SHIFT = 48
FIRST_EDGE = int(np.float64(2.0**-16).view(np.int64))
TOP = np.iinfo(np.int64).max  # above the bits of every finite float
MAX_COLLECTED = 8_000_000  # values held at once by the last pass
QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


@dataclass(frozen=True)
class CellStatistics:
    """What the pass for the medians also saw.

    Attributes
    ----------
    n_cells
        Cells looked at.
    empty_rows
        int64: global rows of the cells without a count on any vocabulary gene, ascending.
    genes_per_cell
        Quantiles of the number of vocabulary genes with a count ("min", "5%", …, "median", …, "max").
    """

    n_cells: int
    empty_rows: np.ndarray
    genes_per_cell: dict[str, float]


def normalized(cells: CellBatch, target_sum: float, normalize: Literal["library_size", "none"]) -> np.ndarray:
    """Return counts / library size × `target_sum`, or the counts as they are: float64 (nnz)."""
    counts = cells.counts.astype(np.float64)
    if normalize == "none":
        return counts
    return counts / np.repeat(cells.library_size.astype(np.float64), cells.n_genes_per_cell) * target_sum


def gene_medians(
    store: CellStore, rows: np.ndarray, target_sum: float, normalize: Literal["library_size", "none"]
) -> tuple[np.ndarray, CellStatistics]:
    """Return each gene's median over its positive values, as Geneformer scales by (Theodoris et al. 2023).

    Parameters
    ----------
    store, rows
        The cells to measure on (global rows).
    target_sum, normalize
        What a value is: count / library size × `target_sum`, or the count.

    Returns
    -------
    medians
        float64 (n_genes): exact; NaN for genes without a positive value.
    statistics
        Empty cells and genes per cell.
    """
    rows = np.sort(np.asarray(rows, dtype=np.int64))  # in the order of the files: each chunk is read once
    blocks = [rows[i : i + BLOCK_CELLS] for i in range(0, len(rows), BLOCK_CELLS)]

    def values(block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        cells = store.read(block)
        return normalized(cells, target_sum, normalize).view(np.int64), cells.gene_ids, cells.n_genes_per_cell

    counts = np.zeros((store.vocab.n_genes, BINS), dtype=np.uint32)
    lengths = np.zeros(len(rows), dtype=np.int32)
    done = 0
    for block in blocks:
        keys, genes, lengths[done : done + len(block)] = values(block)
        _count(counts, genes, np.maximum(keys - FIRST_EDGE, 0) >> FIRST_SHIFT)
        done += len(block)
    quantiles = {name: float(np.quantile(lengths, q)) if len(rows) else 0.0 for name, q in QUANTILES.items()}
    statistics = CellStatistics(len(rows), rows[lengths == 0], quantiles)

    # Of an even number of values the median is the mean of the middle two, each sought on its own.
    total = counts.sum(axis=1, dtype=np.int64)
    ranks = (total - 1) // 2, np.where(total > 0, total // 2, -1)
    sought = [_Sought.first(counts, rank) for rank in ranks]
    while sum(middle.n_collected for middle in sought) > MAX_COLLECTED:
        finer = [np.zeros_like(counts) for _ in sought]
        for block in blocks:
            keys, genes, _ = values(block)
            for middle, bins in zip(sought, finer, strict=True):
                middle.count(bins, keys, genes)
        sought = [middle.narrowed(bins) for middle, bins in zip(sought, finer, strict=True)]

    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for block in blocks:
        keys, genes, _ = values(block)
        for middle, kept in zip(sought, found, strict=True):
            kept.append(middle.pick(keys, genes))
    middles = [middle.select(kept) for middle, kept in zip(sought, found, strict=True)]
    return np.where(total > 0, (middles[0] + middles[1]) / 2, np.nan), statistics


def _count(counts: np.ndarray, genes: np.ndarray, bins: np.ndarray) -> None:
    """Add one to the bin of each value; the last bin takes all that lies above."""
    np.add.at(counts.reshape(-1), genes.astype(np.int64) * BINS + np.minimum(bins, BINS - 1), 1)


@dataclass(frozen=True)
class _Sought:
    """For each gene, the interval of float bits that holds its value of a rank, and the rank within it.

    All arrays are int64 (n_genes); `held` values lie in [low, high).
    """

    low: np.ndarray
    high: np.ndarray
    rank: np.ndarray
    held: np.ndarray

    @classmethod
    def first(cls, counts: np.ndarray, rank: np.ndarray) -> _Sought:
        """Start with the bin of the first pass."""
        bin_, below, held = _bin_of_rank(counts, rank)
        edge = FIRST_EDGE + (bin_ << FIRST_SHIFT)
        low = np.where(bin_ == 0, 0, edge)
        return cls(low, np.where(bin_ == BINS - 1, TOP, edge + (1 << FIRST_SHIFT)), rank - below, held)

    @property
    def open(self) -> np.ndarray:
        """Genes whose value is not known yet: the interval still holds more than one number."""
        return self.high - self.low > 1

    @property
    def n_collected(self) -> int:
        """Number of values that `pick` will keep."""
        return int(self.held[self.open].sum())

    @property
    def shift(self) -> np.ndarray:
        """Width of the next bins, as a power of two."""
        return np.maximum(np.ceil(np.log2(self.high - self.low)).astype(np.int64) - BIN_BITS, 0)

    def pick(self, keys: np.ndarray, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keep the values that lie in the open interval of their gene."""
        inside = self.open[genes] & (keys >= self.low[genes]) & (keys < self.high[genes])
        return keys[inside], genes[inside]

    def count(self, counts: np.ndarray, keys: np.ndarray, genes: np.ndarray) -> None:
        """Count values in the bins that divide the interval."""
        keys, genes = self.pick(keys, genes)
        _count(counts, genes, (keys - self.low[genes]) >> self.shift[genes])

    def narrowed(self, counts: np.ndarray) -> _Sought:
        """Return the bin of that division which holds the rank."""
        bin_, below, held = _bin_of_rank(counts, self.rank)
        low = self.low + (bin_ << self.shift)
        high = np.where(bin_ == BINS - 1, self.high, np.minimum(self.high, low + (1 << self.shift)))
        return _Sought(
            np.where(self.open, low, self.low),
            np.where(self.open, high, self.high),
            np.where(self.open, self.rank - below, self.rank),
            np.where(self.open, held, self.held),
        )

    def select(self, kept: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Return the value of the rank, float64 (n_genes), from all that `pick` kept."""
        keys = np.concatenate([np.zeros(0, dtype=np.int64), *(k for k, _ in kept)])
        genes = np.concatenate([np.zeros(0, dtype=np.int32), *(g for _, g in kept)])
        keys = keys[np.lexsort((keys, genes))]
        in_gene = np.bincount(genes, minlength=len(self.low))
        out = self.low.copy()
        some = in_gene > 0
        out[some] = keys[(np.cumsum(in_gene) - in_gene + self.rank)[some]]
        return out.view(np.float64)


def _bin_of_rank(counts: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the bin of each gene that holds the value of a rank, the number of values below it and in it."""
    up_to = np.cumsum(counts, axis=1, dtype=np.int64)
    bin_ = np.minimum((up_to <= rank[:, None]).sum(axis=1), BINS - 1)
    gene = np.arange(len(counts))
    held = counts[gene, bin_].astype(np.int64)
    return bin_, up_to[gene, bin_] - held, held


def select_hvg(
    store: CellStore,
    rows: np.ndarray,
    hvg: HighlyVariableGenes,
    preprocessing: Preprocessing,
    seed: int,
    max_cells: int = 50_000,
) -> np.ndarray:
    """Return the most variable genes of the given cells, by `scanpy.pp.highly_variable_genes`.

    Values are log1p of the counts, normalized as `preprocessing` says by the library size over all genes;
    genes without a count in these cells are left out before scanpy sees them.

    Parameters
    ----------
    store, rows
        The training cells (global rows).
    hvg
        How many genes, by which method.
    preprocessing
        `normalize` and `target_sum` are read.
    seed
        Decides which cells are taken where there are more than `max_cells`.

    Returns
    -------
    int64, ascending: rows of the vocabulary.

    Raises
    ------
    DataError
        If no gene has a count in these cells.
    """
    import scanpy as sc  # slow to import

    if len(rows) > max_cells:
        logger.info("Highly variable genes: chosen on %s of %s cells.", f"{max_cells:,}", f"{len(rows):,}")
        rows = np.asarray(rows)[permutation(np.arange(max_cells), len(rows), seed)]
    rows = np.sort(rows)
    blocks = []
    for i in range(0, len(rows), BLOCK_CELLS):
        cells = store.read(rows[i : i + BLOCK_CELLS])
        values = np.log1p(normalized(cells, preprocessing.target_sum, preprocessing.normalize)).astype(
            np.float32
        )
        shape = (cells.n_cells, store.vocab.n_genes)
        blocks.append(sparse.csr_matrix((values, cells.gene_ids, cells.indptr), shape=shape))
    matrix = sparse.vstack(blocks, format="csr")
    seen = np.flatnonzero(matrix.getnnz(axis=0))
    if not len(seen):
        raise DataError("No training cell has a single count on a gene of the vocabulary: nothing varies.")
    if len(seen) <= hvg.n_top_genes:
        logger.warning(
            "data.preprocessing.hvg.n_top_genes is %s, but only %s genes have counts in the training cells: "
            "all of these are kept.",
            f"{hvg.n_top_genes:,}",
            f"{len(seen):,}",
        )
        return seen
    table = sc.pp.highly_variable_genes(
        ad.AnnData(matrix[:, seen]), n_top_genes=hvg.n_top_genes, flavor=hvg.flavor, inplace=False
    )
    return seen[table["highly_variable"].to_numpy()]
