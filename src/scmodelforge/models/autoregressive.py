"""`autoregressive_transformer`: a causal transformer that tells the next gene and its count (TranscriptFormer)."""

from __future__ import annotations

from dataclasses import replace

import torch

from scmodelforge.config import Config
from scmodelforge.errors import ModelError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.base import CellTransformer, at, cell_of
from scmodelforge.models.gene_prediction import GenePrediction
from scmodelforge.models.heads import CountHead, ExpressionHead, build_gene_head
from scmodelforge.models.objectives.counts import EPSILON
from scmodelforge.models.sequences import Sequences
from scmodelforge.models.transformer import initialize
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import PackedTokens, unpack


def autoregressive_transformer(config: Config, vocab: GeneVocab) -> CellTransformer:
    """The causal model of a pretraining task: next genes, or values written gene by gene (scGPT)."""
    if config.model.task_like == "expression_reconstruction":
        from scmodelforge.models.generative import GenerativeTransformer

        return GenerativeTransformer(config, vocab)
    return AutoregressiveTransformer(config, vocab)


class AutoregressiveTransformer(CellTransformer):
    """A causal transformer over `<cls>` g₀ g₁ …; the hidden state of each token predicts the token after it.

    It reads at most `tokenizer.max_genes` − 1 tokens, as nothing comes after the last one. Tokens of obs columns come
    before `<cls>`; a column whose category is unknown is left out.

    With `model.count_bias` a query adds log(1 + ε + count) of a gene to the score of its key; in training not to its
    own, but while embedding to its own too (TranscriptFormer). Special tokens and obs tokens have the count 1.

    Attributes
    ----------
    head
        Names genes; None for a dual_prediction with gene_weight 0.
    expression_head
        Tells the value of the next gene from the hidden state and the vector of that gene; None for next_gene.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__(config, vocab)
        dual = config.model.task_like == "dual_prediction"
        self.max_length = config.tokenizer.max_genes - 1
        self.appends_eos = config.tokenizer.append_eos
        self.count_bias = config.model.count_bias
        names_genes = not dual or config.model.objective.gene_weight > 0
        self.head = build_gene_head(config, vocab) if names_genes else None
        self.expression_head: CountHead | ExpressionHead | None = None
        if dual and config.value_loss == "zero_truncated_poisson":
            self.expression_head = CountHead(config.model, vocab.n_tokens)
        elif dual:
            self.expression_head = ExpressionHead(config, vocab, with_gene=True)
        self.apply(initialize)

    def sequences(self, tokens: PackedTokens, embed: bool = False) -> Sequences:
        """As in `CellTransformer`, causal and with the count bias; `embed` as in `forward`."""
        bias = None
        if self.count_bias:
            counts = tokens.values.where(tokens.input_ids >= self.first_gene_token, 1.0)
            bias = torch.log1p(counts + EPSILON)
        return Sequences(tokens.cu_seqlens, tokens.max_length, True, bias, biases_itself=embed)

    def sequences_to_embed(self, tokens: PackedTokens) -> Sequences:
        """As in `CellTransformer`: each token's own count biases its attention to itself."""
        return self.sequences(tokens, embed=True)

    def forward(self, tokens: TokenBatch | PackedTokens, embed: bool = False) -> torch.Tensor:
        """Hidden states (total, width) of packed cells; (n_cells, length, width) of padded ones, zero at padding.

        `embed`: each token's own count biases its attention to itself, as TranscriptFormer does for embeddings.
        """
        packed = self.packed(tokens)
        hidden = self.transformer(self.inputs(packed), self.sequences(packed, embed))
        return hidden if packed is tokens else unpack(hidden, packed, tokens.input_ids.shape[1])

    def embedded_tokens(self, tokens: PackedTokens) -> torch.Tensor:
        """As in `CellTransformer`: with each token's own count."""
        return self(tokens, embed=True)

    def encode(self, tokens: TokenBatch | PackedTokens, pooling: str | None = None) -> torch.Tensor:
        """Cell embeddings (n_cells, width); the same whatever cells they come with.

        `<eos>` is not read, and neither is the last gene of a cell that fills the window: what a causal model reads
        is what it was trained to go on from.

        Raises
        ------
        ModelError
            For pooling "cls": `<cls>` comes first and has seen no gene.
        """
        if (pooling or self.pooling) == "cls":
            raise ModelError(
                "pooling 'cls' says nothing about a cell in an autoregressive model: <cls> comes first, and its hidden "
                "state has seen no gene. Use pooling 'mean' or 'window'."
            )
        packed = self.readable(tokens) if isinstance(tokens, TokenBatch) else tokens
        return self.cell_embedding(self.embedded_tokens(packed), packed, pooling)

    def readable(self, tokens: TokenBatch, total: int | None = None) -> PackedTokens:
        """As in `CellTransformer`, of what `read` leaves."""
        return self.packing(self.read(tokens), total)

    def read(self, tokens: TokenBatch) -> TokenBatch:
        """The tokens that go in: without `<eos>`, and at most as many as the window holds."""
        length = min(tokens.input_ids.shape[1] - self.appends_eos, self.max_length)
        return replace(
            tokens,
            input_ids=tokens.input_ids[:, :length],
            values=tokens.values[:, :length],
            lengths=(tokens.lengths - int(self.appends_eos)).clamp(max=length),
        )

    def genes_at(self, hidden: torch.Tensor, places: torch.Tensor) -> GenePrediction:
        """What the head says about the tokens that follow flat places (m) of hidden states, packed or padded."""
        assert self.head is not None
        return self.head(at(hidden, places), self.embedding.tokens)

    def expression(
        self,
        hidden: torch.Tensor,
        places: torch.Tensor,
        genes: torch.Tensor,
        tokens: TokenBatch | PackedTokens,
    ) -> torch.Tensor:
        """Outputs (m, n_outputs) for the values of the genes `genes` (m) that follow flat places (m).

        Those of a `CountHead` are scores, which `objectives.counts.count_rates` makes rates of.
        """
        assert self.expression_head is not None
        asked, vectors = at(hidden, places), self.embedding.genes(genes)
        if isinstance(self.expression_head, CountHead):
            return self.expression_head(asked, vectors, genes)
        return self.expression_head(asked, vectors, tokens.obs, cell_of(tokens, places))
