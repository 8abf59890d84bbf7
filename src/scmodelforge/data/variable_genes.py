"""Highly variable genes of any number of cells, in one pass: the selection of `scanpy.pp.highly_variable_genes`.

scanpy takes a matrix in memory, but all it uses of it are the mean and variance of each gene. These come from a pass
over the cells, in scanpy's precision: values are float32, and so are their squares, sums are float64.
"""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import norm

from scmodelforge.config import HighlyVariableGenes, Preprocessing
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.preprocess import normalized
from scmodelforge.data.statistics import gene_moments
from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError

logger = logging.getLogger(__name__)

SEURAT_BINS = 20
CELL_RANGER_PERCENTILES = np.arange(10, 105, 5)
MAD_OF_NORMAL = norm.ppf(0.75)  # the median absolute deviation of a standard normal variable


def select_hvg(
    store: CellStore,
    rows: np.ndarray,
    hvg: HighlyVariableGenes,
    preprocessing: Preprocessing,
    threads: int = 2,
) -> np.ndarray:
    """Return the most variable genes of the given cells, those that `scanpy.pp.highly_variable_genes` selects.

    Values are log1p of the counts, normalized as `preprocessing` says by the library size over all genes;
    genes without a count in these cells are left out. Genes as variable as the last one are all kept.

    Parameters
    ----------
    store, rows
        The training cells (global rows).
    hvg
        How many genes, by which method.
    preprocessing
        `normalize` and `target_sum` are read.
    threads
        Blocks of cells worked on at once.

    Returns
    -------
    int64, ascending: rows of the vocabulary.

    Raises
    ------
    DataError
        If no gene has a count in these cells, or none varies.
    """

    def values(cells: CellBatch) -> np.ndarray:
        values = normalized(cells, preprocessing.target_sum, preprocessing.normalize)
        logged = np.log1p(values, out=values).astype(np.float32)
        return np.expm1(logged, out=logged) if hvg.flavor == "seurat" else logged

    moments = gene_moments(store, rows, values, threads)
    seen = np.flatnonzero(moments.n_cells)
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
    dispersions = normalized_dispersions(moments.means[seen], moments.variances[seen], hvg.flavor)
    known = np.sort(dispersions[~np.isnan(dispersions)])[::-1]
    if not len(known):
        raise DataError(
            f"data.preprocessing.hvg: no gene varies over the {len(rows):,} training cells.\n"
            "Give more cells to train on, or leave data.preprocessing.hvg out."
        )
    if len(known) < hvg.n_top_genes:
        logger.warning(
            "data.preprocessing.hvg.n_top_genes is %s, but only %s genes vary: these are kept.",
            f"{hvg.n_top_genes:,}",
            f"{len(known):,}",
        )
    return seen[dispersions >= known[min(hvg.n_top_genes, len(known)) - 1]]


def normalized_dispersions(
    means: np.ndarray, variances: np.ndarray, flavor: Literal["seurat", "cell_ranger"]
) -> np.ndarray:
    """Compare the dispersion (variance / mean) of each gene with that of genes of a similar mean.

    "seurat" (Satija et al. 2015) takes the logarithm of the dispersions of values before log1p, and their mean and
    standard deviation in 20 equal bins of log1p of the mean; "cell_ranger" (Zheng et al. 2017) those after log1p,
    and their median and median absolute deviation between the percentiles 10, 15, …, 100 of the mean.

    Parameters
    ----------
    means, variances
        float64 (n_genes), means above 0.

    Returns
    -------
    float64 (n_genes); NaN where "seurat" meets a gene that does not vary.

    Raises
    ------
    DataError
        If too many genes have the same mean for the bins of "cell_ranger".
    """
    dispersion = variances / means
    if flavor == "seurat":
        with np.errstate(invalid="ignore"):  # rounding leaves some variances of constant genes just below 0
            dispersion = np.log(np.where(dispersion == 0, np.nan, dispersion))
        bins = pd.cut(np.log1p(means), SEURAT_BINS, labels=False)
    else:
        edges = np.r_[-np.inf, np.percentile(means, CELL_RANGER_PERCENTILES), np.inf]
        if len(np.unique(edges)) < len(edges):
            raise DataError(
                "data.preprocessing.hvg.flavor is cell_ranger, which compares genes of a similar mean, but too many of "
                f"the {len(means):,} genes have exactly the same one.\nSet flavor: seurat."
            )
        bins = pd.cut(means, edges, labels=False)
    of_bin = pd.Series(dispersion).groupby(bins)
    if flavor == "seurat":
        center, spread = of_bin.transform("mean"), of_bin.transform("std")
        alone = spread.isna()  # one gene in its bin: its normalized dispersion is 1
        center, spread = center.where(~alone, 0.0), spread.where(~alone, center)
    else:
        center = of_bin.transform("median")
        spread = (abs(dispersion - center) / MAD_OF_NORMAL).groupby(bins).transform("median")
    return ((dispersion - center) / spread).to_numpy()
