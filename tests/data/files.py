"""Writes the same counts in every way that AnnData can store them."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from scmodelforge.config import DataConfig

NO_MINIMUM = DataConfig(min_gene_overlap=0.0)
STORAGES = (
    "csr",
    "csr_gzip",
    "csc",
    "csc_gzip",
    "dense",
    "dense_gzip",
    "layer",
    "raw",
    "csr_int64_indices",
    "csr_mixed_indices",
    "csr_explicit_zeros",
    "csr_unsorted",
    "uint16",
    "int64",
    "float64",
    "memory_csr",
    "memory_csc",
    "memory_dense",
    "memory_view",
    "backed",
    "backed_view",
)


def make_adata(counts: np.ndarray, genes: np.ndarray, first_cell: int = 0) -> ad.AnnData:
    """CSR float32 counts; `genes` numbers the genes as `make_vocab` does."""
    cells = [f"cell{i}" for i in range(first_cell, first_cell + len(counts))]
    return ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(index=pd.Index(cells)),
        var=pd.DataFrame(
            {"ensembl_id": [f"ENSG{g:011d}" for g in genes]}, index=[f"v{i}" for i in range(len(genes))]
        ),
    )


def store_as(storage: str, counts: np.ndarray, genes: np.ndarray, folder: Path) -> tuple[object, str | None]:
    """Return a source and the layer that together hold `counts`, stored in the way named."""
    adata, path, layer = make_adata(counts, genes), folder / f"{storage}.h5ad", None
    compression = "gzip" if storage.endswith("_gzip") else None
    kind = storage.split("_")[0]
    if kind == "csc":
        adata.X = adata.X.tocsc()
    elif kind == "dense":
        adata.X = adata.X.toarray()
    elif kind in ("uint16", "int64", "float64"):
        adata.X = adata.X.astype(kind)
    elif kind == "layer":
        layer, adata.layers["counts"], adata.X = "counts", adata.X, sparse.csr_matrix(np.log1p(counts))
    elif kind == "raw":
        layer, adata.raw = "raw", adata.copy()
        adata = adata[:, :1].copy()
    elif storage == "csr_explicit_zeros":
        full = sparse.csr_matrix(np.ones_like(counts, dtype=np.float32))
        full.data[:] = counts.ravel()
        adata.X = full
    elif storage == "csr_unsorted":
        reverse = [
            i
            for a, b in zip(adata.X.indptr, adata.X.indptr[1:], strict=False)
            for i in range(b - 1, a - 1, -1)
        ]
        adata.X = sparse.csr_matrix(
            (adata.X.data[reverse], adata.X.indices[reverse], adata.X.indptr), adata.shape
        )
    elif kind == "memory":
        if storage == "memory_view":
            padded = make_adata(np.vstack([counts + 1, counts]), genes, -len(counts))
            return padded[len(counts) :], None
        adata.X = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": adata.X.toarray()}[storage.split("_")[1]]
        return adata, None
    adata.write_h5ad(path, compression=compression)
    if storage in ("csr_int64_indices", "csr_mixed_indices"):
        with h5py.File(path, "r+") as file:
            for name in ("indptr", "indices") if storage == "csr_int64_indices" else ("indptr",):
                values = file["X"][name][:].astype(np.int64)
                del file["X"][name]
                file["X"][name] = values
    if storage == "backed":
        return ad.read_h5ad(path, backed="r"), None
    if storage == "backed_view":
        make_adata(np.vstack([counts + 1, counts]), genes, -len(counts)).write_h5ad(path)
        return ad.read_h5ad(path, backed="r")[len(counts) :], None
    return path, layer


def slow_batch(
    counts: np.ndarray, genes: np.ndarray, rows: np.ndarray, n_genes: int
) -> tuple[np.ndarray, ...]:
    """`CellBatch` by a plain loop: dense counts (rows, n_genes) in vocabulary order, and library sizes."""
    out = np.zeros((len(rows), n_genes))
    for i, row in enumerate(rows):
        for column, gene in enumerate(genes):
            if gene < n_genes:
                out[i, gene] += counts[row, column]
    return out, counts[rows].sum(axis=1)


def as_dense(batch, n_genes: int) -> np.ndarray:
    """The counts of a `CellBatch`, dense; its promises are checked on the way."""
    assert batch.indptr.dtype == np.int64
    assert batch.gene_ids.dtype == np.int32
    assert batch.counts.dtype == np.float32
    assert batch.library_size.dtype == np.float32
    assert batch.cell_index.dtype == np.int64
    assert (batch.counts > 0).all()
    out = np.zeros((batch.n_cells, n_genes))
    for cell in range(batch.n_cells):
        genes = batch.gene_ids[batch.indptr[cell] : batch.indptr[cell + 1]]
        assert (np.diff(genes) > 0).all(), "genes ascend and occur once"
        out[cell, genes] = batch.counts[batch.indptr[cell] : batch.indptr[cell + 1]]
    return out
