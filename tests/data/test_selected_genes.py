"""A vocabulary of variable genes holds few of the counts, and files are accepted all the same."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from scmodelforge.config import DataConfig
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError
from scmodelforge.genes.vocab import predefined


def test_a_selection_is_judged_by_known_genes_not_by_its_share_of_counts() -> None:
    vocab = predefined("human_protein_coding")
    genes = vocab.gene_ids[:100].astype(str)
    counts = np.ones((5, 100), dtype=np.float32)
    adata = anndata.AnnData(counts, var=pd.DataFrame(index=genes))
    selection = vocab.subset(np.arange(3))
    with pytest.raises(DataError, match=r"only 3.0% of its counts"):
        open_store([adata], selection, DataConfig())
    store = open_store([adata], selection, DataConfig(), selected_genes=True)
    batch = store.read(np.array([0]))
    assert batch.counts.tolist() == [1, 1, 1]
    assert batch.library_size.tolist() == [100]
    mouse_genes = predefined("mouse_protein_coding").gene_ids[:100].astype(str)
    mouse = anndata.AnnData(counts, var=pd.DataFrame(index=mouse_genes))
    with pytest.raises(DataError, match=r"only 0.0% of its counts"):
        open_store([mouse], selection, DataConfig(), selected_genes=True)
