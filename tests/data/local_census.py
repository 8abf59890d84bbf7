"""Writes a small Census: the same cells as an AnnData, laid out as the public one is."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import sparse

from scmodelforge.genes.vocab import predefined

tiledbsoma = pytest.importorskip("tiledbsoma", reason="needs the extra 'census'")
soma_io = pytest.importorskip("tiledbsoma.io")


def census_cells(n_cells: int = 300, n_genes: int = 60, seed: int = 0) -> ad.AnnData:
    """Sparse counts of real genes, a few of them large, and obs columns as the Census has them."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.5, (n_cells, n_genes))
    counts[rng.integers(0, n_cells, 5), rng.integers(0, n_genes, 5)] = [300, 70_000, 255, 256, 65_535]
    counts[3] = 0
    vocab = predefined("human_protein_coding")
    return ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical(rng.choice(["B cell", "T cell", "natural killer cell"], n_cells)),
                "tissue_general": pd.Categorical(rng.choice(["blood", "lung"], n_cells)),
                "tissue": pd.Categorical(rng.choice(["blood", "lung", "alveolus of lung"], n_cells)),
                "disease": pd.Categorical(rng.choice(["normal", "Crohn's disease"], n_cells)),
                "assay": pd.Categorical(rng.choice(["10x 3' v3", "Smart-seq2"], n_cells)),
                "dataset_id": pd.Categorical(rng.choice(["d1", "d2", "d3"], n_cells)),
                "donor_id": rng.choice(["p1", "p2", "p3", "p4"], n_cells),  # text that is not coded
                "is_primary_data": rng.random(n_cells) < 0.8,
                "nnz": (counts > 0).sum(axis=1),
            },
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(
            {
                "feature_id": vocab.gene_ids[:n_genes].astype(str),
                "feature_name": vocab.symbols[:n_genes].astype(str),
            },
            index=[f"g{i}" for i in range(n_genes)],
        ),
    )


def write_census(folder: Path, **organisms: ad.AnnData) -> str:
    """Write cells of each organism, numbered as they come, and return the address."""
    with warnings.catch_warnings(), tiledbsoma.Collection.create(str(folder)) as census:
        warnings.simplefilter("ignore")
        with census.add_new_collection("census_info") as info:
            summary = {
                "label": ["census_schema_version", "census_build_date"],
                "value": ["2.1.0", "2026-01-01"],
            }
            table = pa.table({"soma_joinid": np.arange(2), **summary})
            with info.add_new_dataframe(
                "summary", schema=table.schema, index_column_names=["soma_joinid"], domain=[(0, 1)]
            ) as frame:
                frame.write(table)
        with census.add_new_collection("census_data") as data:
            for name, cells in organisms.items():
                where = str(folder / "census_data" / name)
                soma_io.from_anndata(where, cells.copy(), measurement_name="RNA", X_layer_name="raw")
                with tiledbsoma.Experiment.open(where) as experiment:
                    data.set(name, experiment, use_relative_uri=True)
    return str(folder)
