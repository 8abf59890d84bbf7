"""The compiled kernels against slow twins, and contiguous files that are mapped instead of read."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
from anndata.io import write_elem
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from scmodelforge.config import DataConfig
from scmodelforge.data.matrix import Rows
from scmodelforge.data.sources import open_matrix
from scmodelforge.data.store import open_store, to_vocabulary
from tests.helpers import make_vocab, marker_cells


def slow_twin(
    matrix: sparse.csr_matrix, rows: np.ndarray, gene_index: np.ndarray, n_genes: int
) -> np.ndarray:
    """Dense counts (n, n_genes) of the given rows, by scipy's matrix product."""
    known = np.flatnonzero(gene_index >= 0)
    to_gene = sparse.csr_matrix(
        (np.ones(len(known)), (known, gene_index[known])), shape=(len(gene_index), n_genes)
    )
    return (matrix[rows].astype(np.float64) @ to_gene).toarray()


@st.composite
def matrices(draw):
    n_cells, n_columns, n_genes = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 8))
    counts = draw(hnp.arrays(np.int64, (n_cells, n_columns), elements=st.sampled_from([0, 0, 0, 1, 2, 300])))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.uint16, np.int64]))
    index_dtype = draw(st.sampled_from([np.int32, np.int64, np.uint16]))
    gene_index = draw(hnp.arrays(np.int64, n_columns, elements=st.integers(-1, n_genes - 1)))
    rows = draw(hnp.arrays(np.int64, draw(st.integers(0, 8)), elements=st.integers(0, n_cells - 1)))
    matrix = sparse.csr_matrix(counts.astype(dtype))
    held = Rows(matrix.indptr.astype(np.int64), matrix.indices.astype(index_dtype), matrix.data)
    return matrix, held, gene_index, n_genes, rows


@given(matrices())
@settings(max_examples=150, deadline=None)
def test_cells_meet_the_vocabulary_as_in_the_slow_version(drawn) -> None:
    matrix, held, gene_index, n_genes, rows = drawn
    whole = to_vocabulary(held, rows, gene_index)
    assert whole is not None
    mapped, library_size = whole
    expected = slow_twin(matrix, rows, gene_index, n_genes)
    dense = sparse.csr_matrix((mapped.data, mapped.indices, mapped.indptr), shape=expected.shape).toarray()
    np.testing.assert_array_equal(dense, expected)
    np.testing.assert_array_equal(library_size, np.asarray(matrix[rows].sum(axis=1)).ravel())
    for i in range(len(rows)):
        genes = mapped.indices[mapped.indptr[i] : mapped.indptr[i + 1]]
        assert (np.diff(genes) > 0).all()
    assert (mapped.data > 0).all()


@pytest.mark.parametrize(("count", "column"), [(-1, 0), (np.nan, 0), (np.inf, 0), (1, 3), (1, -1)])
def test_what_cannot_be_is_told(count: float, column: int) -> None:
    held = Rows(np.array([0, 1]), np.array([column], np.int32), np.array([count], np.float32))
    assert to_vocabulary(held, np.array([0]), np.array([0, 1, 2])) is None


def write_contiguous(adata: ad.AnnData, path: Path, dtype: type = np.uint16) -> None:
    """Write an .h5ad whose CSR arrays are contiguous, as AnnData's on-disk specification allows."""
    adata.write_h5ad(path)
    matrix = sparse.csr_matrix(adata.X)
    with h5py.File(path, "r+") as handle:
        del handle["X"]
        group = handle.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": adata.shape})
        group.create_dataset("data", data=matrix.data.astype(dtype))
        group.create_dataset("indices", data=matrix.indices.astype(np.int32))
        group.create_dataset("indptr", data=matrix.indptr.astype(np.int64))
        write_elem(handle, "uns", {})


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8, np.float32, np.float16, ">f4"])
def test_a_contiguous_file_is_mapped_and_gives_the_same_cells(tmp_path: Path, dtype: type) -> None:
    cells = marker_cells(50)
    cells.write_h5ad(tmp_path / "chunked.h5ad", compression="gzip")
    write_contiguous(cells, tmp_path / "contiguous.h5ad", dtype)
    if dtype not in (np.float16, ">f4"):  # which scipy does not know
        np.testing.assert_array_equal(
            ad.read_h5ad(tmp_path / "contiguous.h5ad").X.toarray(), cells.X.toarray()
        )
    if dtype != ">f4":
        assert "contiguous" in open_matrix(tmp_path / "contiguous.h5ad").storage
    rows = np.random.default_rng(0).integers(0, 50, 200)
    batches = [
        open_store([tmp_path / f"{name}.h5ad"], make_vocab(40), DataConfig()).read(rows)
        for name in ("chunked", "contiguous")
    ]
    for part in ("indptr", "gene_ids", "counts", "library_size"):
        one, two = (getattr(batch, part) for batch in batches)
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
