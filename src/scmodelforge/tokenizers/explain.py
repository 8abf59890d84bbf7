"""What the first cell of a batch became, as a table."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scmodelforge.config import TokenizerConfig
from scmodelforge.data.batch import CellBatch
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import TokenBatch


def of_first_cell(cells: CellBatch, values: np.ndarray, vocab: GeneVocab) -> np.ndarray:
    """float64 (n_genes): entries (nnz) of the first cell by gene, 0 where it has none."""
    first = slice(cells.indptr[0], cells.indptr[1])
    dense = np.zeros(vocab.n_genes)
    dense[cells.gene_ids[first]] = values[first]
    return dense


def explain_tokens(
    batch: TokenBatch,
    cells: CellBatch,
    config: TokenizerConfig,
    vocab: GeneVocab,
    **by_gene: np.ndarray,
) -> pd.DataFrame:
    """Table of the first cell's tokens.

    Parameters
    ----------
    batch
        The tokens.
    cells
        What they were made from.
    config, vocab
        Of the tokenizer.
    by_gene
        Further columns: float (n_genes) each.

    Returns
    -------
    DataFrame with columns position, token, name, gene_id, counts and those of `by_gene`, which are NaN at special
    tokens. obs tokens, if there are any, come first at positions below 0; their token is the number of the category.
    """
    length = int(batch.lengths[0])
    token = batch.input_ids[0, :length].numpy()
    gene = np.maximum(token - vocab.first_gene_token, 0)
    is_gene = token >= vocab.first_gene_token
    columns = {"counts": of_first_cell(cells, cells.counts, vocab)} | by_gene
    table = pd.DataFrame(
        {
            "position": np.arange(length),
            "token": token,
            "name": vocab.tokens_to_names(token),
            "gene_id": np.where(is_gene, vocab.gene_ids[gene], ""),
        }
        | {name: np.where(is_gene, values[gene], np.nan) for name, values in columns.items()}
    )
    if cells.obs is None or not config.obs_tokens:
        return table
    code_of = dict(zip(vocab.obs_categories, cells.obs[0], strict=True))
    codes = [int(code_of[column]) for column in config.obs_tokens]
    names = [
        f"{column}: {vocab.obs_categories[column][code - 1] if code else '(unknown)'}"
        for column, code in zip(config.obs_tokens, codes, strict=True)
    ]
    obs = pd.DataFrame({"position": range(-len(codes), 0), "token": codes, "name": names, "gene_id": ""})
    return pd.concat([obs, table], ignore_index=True)
