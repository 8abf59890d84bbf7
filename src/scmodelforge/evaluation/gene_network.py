"""Networks of genes: pairs read from a file, and random pairs in which every gene is as frequent as in the network.

Well-studied genes have many known partners, so against pairs drawn uniformly anything that knows how popular (or how
highly expressed) a gene is would look good. Here each gene is in exactly as many random pairs as in true ones: the ends
of the true pairs are shuffled (the configuration model, Newman 2010), and pairs that are no good (a gene with itself,
a true pair, one that is there already) trade ends with other random pairs until all are good. No pair is thrown away
for being bad, which would take partners from the hubs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from scmodelforge.errors import DataError
from scmodelforge.genes.identifiers import match_genes
from scmodelforge.genes.vocab import GeneVocab

log = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
MAX_ROUNDS = 1000  # of trading; a sparse network needs about ten
FEWEST_MATCHED = 0.5  # share of the random pairs that must be possible


@dataclass(frozen=True)
class GeneNetwork:
    """Distinct pairs of genes of a vocabulary.

    Attributes
    ----------
    pairs
        int64 (n_pairs, 2): rows of the vocabulary, the smaller one first.
    n_lines
        Lines of the file.
    n_unknown
        Lines with a name that is no gene of the vocabulary.
    """

    pairs: np.ndarray
    n_lines: int
    n_unknown: int


def read_network(path: str | Path, vocab: GeneVocab, species: str | None = None) -> GeneNetwork:
    """Read pairs of genes, one a line; a gene with itself and repeated pairs are left out.

    Names are recognised as those of data files are: Ensembl ids without their version, symbols, earlier symbols. A line
    of column names is a line with unknown names; lines that begin with `#` are skipped.

    Parameters
    ----------
    species
        Whose genes these are, as in `match_genes`.

    Raises
    ------
    DataError
        If the file is missing, unreadable, has no two columns, or no pair of genes of the vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"params.network: there is no file '{path}'.")
    if path.suffix not in SEPARATORS:
        raise DataError(
            f"params.network: '{path}' does not end in {', '.join(SEPARATORS)}: pairs are read from these."
        )
    try:
        table = pd.read_csv(
            path,
            sep=SEPARATORS[path.suffix],
            header=None,
            usecols=[0, 1],
            dtype=str,
            comment="#",
            keep_default_na=False,
        )
    except (ValueError, OSError) as error:
        raise DataError(
            f"params.network: '{path}' cannot be read as two columns of gene names, parted by "
            f"{'commas' if path.suffix == '.csv' else 'tabs'}: {error}"
        ) from error
    at, names = pd.factorize(table.to_numpy(object).ravel())
    match = match_genes(pd.DataFrame(index=names.astype(str)), vocab, "index", species)
    pairs = np.sort(match.gene_index[at].astype(np.int64).reshape(-1, 2), axis=1)
    known = pairs[pairs[:, 0] >= 0]
    distinct = np.unique(known[known[:, 0] < known[:, 1]], axis=0)
    n_unknown = len(pairs) - len(known)
    if not len(distinct):
        raise DataError(
            f"params.network: none of the {len(pairs):,} lines of '{path}' names two genes of the vocabulary "
            f"'{vocab.name}' (the first says {', '.join(table.iloc[0].tolist())}; the vocabulary has "
            f"{vocab.gene_ids[0]}, …).\nIt must name genes by Ensembl gene id or symbol, in its first two columns."
        )
    log.info(
        "%s: %s distinct pairs of genes in %s lines; %s lines name genes that the vocabulary has not",
        path.name,
        f"{len(distinct):,}",
        f"{len(pairs):,}",
        f"{n_unknown:,}",
    )
    return GeneNetwork(distinct, len(pairs), n_unknown)


def degree_matched_pairs(pairs: np.ndarray, true_pairs: np.ndarray, n_genes: int, seed: int) -> np.ndarray:
    """Draw random pairs in which each gene is as frequent as in `pairs`.

    Parameters
    ----------
    pairs
        int64 (n_pairs, 2): distinct pairs.
    true_pairs
        int64 (n, 2): pairs that must not be drawn.
    n_genes
        Genes are numbers below it.

    Returns
    -------
    int64 (at most n_pairs, 2): distinct pairs of two genes. Fewer, with a warning, where the network is so dense that
    some genes have not enough partners left.

    Raises
    ------
    DataError
        If fewer than half of the pairs can be had.
    """
    rng = np.random.default_rng(seed)

    def keys(some: np.ndarray) -> np.ndarray:
        return some.min(axis=1) * n_genes + some.max(axis=1)

    truth = np.unique(keys(true_pairs))
    drawn = rng.permutation(pairs.ravel()).reshape(-1, 2)
    for _ in range(MAX_ROUNDS):
        taken = keys(drawn)
        bad = np.ones(len(drawn), dtype=bool)
        bad[np.unique(taken, return_index=True)[1]] = False
        bad |= (drawn[:, 0] == drawn[:, 1]) | np.isin(taken, truth)
        if not bad.any():
            break
        left = rng.permutation(np.flatnonzero(bad))[: len(drawn) // 2]
        others = np.setdiff1d(np.arange(len(drawn)), left)
        right = rng.choice(others, len(left), replace=False)
        first, second = drawn[left], drawn[right]
        turned = rng.random(len(left)) < 0.5
        second[turned] = second[turned, ::-1]
        first[:, 1], second[:, 1] = second[:, 1].copy(), first[:, 1].copy()
        new = np.stack([keys(first), keys(second)], axis=1)
        _, at, n = np.unique(new, return_inverse=True, return_counts=True)
        good = (n[at.reshape(new.shape)] == 1) & ~np.isin(new, truth) & ~np.isin(new, taken)
        good &= np.stack([first[:, 0] != first[:, 1], second[:, 0] != second[:, 1]], axis=1)
        better = good.all(axis=1)
        drawn[left[better]], drawn[right[better]] = first[better], second[better]
    if bad.any():
        n_good = int((~bad).sum())
        message = (
            f"The network is dense: only {n_good:,} random pairs of genes with the degrees of its {len(pairs):,} pairs "
            "are not in it."
        )
        if n_good < FEWEST_MATCHED * len(pairs):
            raise DataError(
                f"{message}\nHubs that are joined to nearly every gene leave nothing to compare with: take a sparser "
                "network, such as the pairs with the highest confidence."
            )
        log.warning("%s The others are left out.", message)
    return drawn[~bad]
