"""`root_expression`: genes with a root of their normalized counts.

The square root makes the variance of Poisson counts the same for all means (Bartlett 1936), as the logarithm does for
variances that grow with the square of the mean.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from pydantic import Field

from scmodelforge.config import Config, Section
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.explain import explain_tokens, of_first_cell
from scmodelforge.tokenizers.gene_sequence import expression, gene_tokens


class RootParams(Section):
    """`tokenizer.params` of a config with strategy root_expression."""

    power: float = Field(0.5, gt=0, le=1, description="Exponent; 1 leaves the values as they are.")


class RootTokenizer:
    """Turns cells into genes with values; which genes, and in which order, is as in continuous_projection."""

    like = "continuous_projection"
    Params = RootParams
    ignores = ("tokenizer.max_value",)

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        self.config, self.preprocessing, self.vocab = config.tokenizer, config.data.preprocessing, vocab
        assert isinstance(config.tokenizer.params, RootParams)
        self.power = config.tokenizer.params.power

    @staticmethod
    def misfit(config: Config) -> str:
        """Why it does not work with this config; "" if it does."""
        if config.data.preprocessing.log1p:
            return "the root stands in the place of the logarithm: set data.preprocessing.log1p: false"
        return ""

    def values(self, cells: CellBatch) -> np.ndarray:
        """float64 (nnz): what the model reads beside each gene."""
        return expression(cells, self.preprocessing) ** self.power

    def __call__(self, cells: CellBatch, seed: int = 0, epoch: int = VALIDATION_EPOCH) -> TokenBatch:
        """Tokenize cells; random choices are a function of (seed, epoch, cell)."""
        values = self.values(cells)
        return gene_tokens(cells, values, values, self.config, self.vocab, seed, epoch, zeros_last=True)

    def explain(self, cells: CellBatch) -> pd.DataFrame:
        """What the first cell of `cells` becomes, one row a token."""
        values = of_first_cell(cells, self.values(cells), self.vocab)
        return explain_tokens(self(cells), cells, self.config, self.vocab, value=values)
