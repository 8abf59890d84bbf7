"""What every tokenizer is."""

from __future__ import annotations

from typing import Protocol

import pandas as pd

from scmodelforge import registry
from scmodelforge.config import Config
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.gene_sequence import n_special


class Tokenizer(Protocol):
    """Turns cells into tokens; made from the config and the vocabulary."""

    def __init__(self, config: Config, vocab: GeneVocab) -> None: ...

    def __call__(self, cells: CellBatch, seed: int = 0, epoch: int = VALIDATION_EPOCH) -> TokenBatch:
        """Tokenize cells; random choices are a function of (seed, epoch, cell).

        Outside of training `epoch` stays as it is, so that a cell always becomes the same tokens.
        """
        ...

    def explain(self, cells: CellBatch) -> pd.DataFrame:
        """What the first cell of `cells` becomes, one row a token."""
        ...


def build_tokenizer(config: Config, vocab: GeneVocab) -> Tokenizer:
    """The tokenizer that a config names."""
    strategy: type[Tokenizer] = registry.TOKENIZERS.load(config.tokenizer.strategy)
    return strategy(config, vocab)


def what_differs_by_epoch(config: Config, vocab: GeneVocab) -> str:
    """Why a cell may have other tokens in another epoch of training; empty where it always has the same."""
    tokenizer = config.tokenizer
    if (plugin := registry.TOKENIZERS.plugin(tokenizer.strategy)) is not None:
        return f"{tokenizer.strategy} is a tokenizer of {plugin}, and only it knows whether it draws"
    if tokenizer.strategy_like == "rank_value":
        return ""
    if tokenizer.strategy_like == "binned_expression":
        return "binned_expression spreads equal values over their bins at random"
    if tokenizer.gene_order == "random":
        return "tokenizer.gene_order is random"
    if tokenizer.overlong == "sample" and vocab.n_genes + n_special(tokenizer) > tokenizer.max_genes:
        return "tokenizer.overlong: sample draws genes of cells with more than tokenizer.max_genes"
    return ""
