"""Genes with their values as numbers: counts (TranscriptFormer) or log-normalized values (scFoundation).

Which of them follows from `data.preprocessing`; `max_value` clips them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from scmodelforge.config import Config
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.explain import explain_tokens, of_first_cell
from scmodelforge.tokenizers.gene_sequence import expression, gene_tokens


class ContinuousTokenizer:
    """Turns a `CellBatch` into genes with values.

    Genes without a count, if they are included, follow those with one, and fill what room these leave, as in
    TranscriptFormer. `gene_order: value` sorts before values are clipped.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        self.config = config.tokenizer
        self.preprocessing = config.data.preprocessing
        self.vocab = vocab

    def _clipped(self, values: np.ndarray) -> np.ndarray:
        largest = self.config.max_value
        return values if largest is None else np.minimum(values, largest)

    def __call__(self, cells: CellBatch, seed: int = 0, epoch: int = VALIDATION_EPOCH) -> TokenBatch:
        """Tokenize cells; see `TokenBatch` for shapes. Cells without a gene keep their special tokens."""
        values = expression(cells, self.preprocessing)
        return gene_tokens(
            cells, values, self._clipped(values), self.config, self.vocab, seed, epoch, zeros_last=True
        )

    def explain(self, cells: CellBatch) -> pd.DataFrame:
        """What the first cell of `cells` becomes, one row a token.

        Returns
        -------
        DataFrame as of `explain_tokens`, with value: what the model reads.
        """
        values = of_first_cell(cells, self._clipped(expression(cells, self.preprocessing)), self.vocab)
        return explain_tokens(self(cells), cells, self.config, self.vocab, value=values)
