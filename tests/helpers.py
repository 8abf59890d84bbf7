"""Small vocabularies and cells that several tests build."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from scmodelforge.data.batch import CellBatch
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, GeneVocab


def make_vocab(n_genes: int, medians: np.ndarray | None = None, layout: str = "geneformer_v2") -> GeneVocab:
    """A vocabulary of invented human genes, in ascending order of id."""
    ids = np.array([f"ENSG{i:011d}" for i in range(n_genes)], dtype=object)
    return GeneVocab(
        gene_ids=ids,
        symbols=np.array([f"G{i}" for i in range(n_genes)], dtype=object),
        biotypes=np.full(n_genes, "protein_coding", dtype=object),
        species="human",
        medians=medians,
        special_tokens=VOCAB_LAYOUTS[layout],
        name="test",
    )


def make_cells(counts: np.ndarray, unmatched: np.ndarray | None = None, first_row: int = 0) -> CellBatch:
    """A batch from dense counts (n_cells, n_genes); `unmatched` are counts of genes outside the vocabulary."""
    matrix = sparse.csr_matrix(counts.astype(np.float32))
    total = counts.sum(axis=1) + (0 if unmatched is None else unmatched)
    return CellBatch(
        indptr=matrix.indptr.astype(np.int64),
        gene_ids=matrix.indices.astype(np.int32),
        counts=matrix.data,
        library_size=total.astype(np.float32),
        cell_index=np.arange(first_row, first_row + len(counts), dtype=np.int64),
    )
