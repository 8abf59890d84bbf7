"""`autoregressive_transformer`: a causal transformer that tells the next gene and its count (TranscriptFormer)."""

from __future__ import annotations

from dataclasses import replace

import torch

from scmodelforge.config import Config
from scmodelforge.errors import ModelError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.heads import CountHead, ExpressionHead, build_gene_head
from scmodelforge.models.objectives.counts import EPSILON
from scmodelforge.models.transformer import initialize
from scmodelforge.tokenizers.batch import TokenBatch


def autoregressive_transformer(config: Config, vocab: GeneVocab) -> CellTransformer:
    """The causal model of a pretraining task: next genes, or values written gene by gene (scGPT)."""
    if config.model.pretraining_task == "expression_reconstruction":
        from scmodelforge.models.generative import GenerativeTransformer

        return GenerativeTransformer(config, vocab)
    return AutoregressiveTransformer(config, vocab)


class AutoregressiveTransformer(CellTransformer):
    """A causal transformer over `<cls>` g₀ g₁ …; the hidden state of each token predicts the token after it.

    It reads at most `tokenizer.max_genes` − 1 tokens, as nothing comes after the last one. Tokens of obs columns come
    before `<cls>`; a column whose category is unknown is read by nobody. Pads are on the right, where no token
    looks, and need no mask.

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
        dual = config.model.pretraining_task == "dual_prediction"
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

    def inputs(
        self, tokens: TokenBatch, embed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int]:
        """As in `CellTransformer`, with the causal mask and the count bias; `embed` as in `forward`."""
        x, _, _, n_obs = super().inputs(tokens)
        length = x.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if self.obs_embedding is not None:
            assert tokens.obs is not None
            known = torch.ones(x.shape[0], length, dtype=torch.bool, device=x.device)
            known[:, :n_obs] = tokens.obs[:, self.obs_embedding.places] != 0
            itself = torch.eye(length, dtype=torch.bool, device=x.device)  # so that nobody reads nothing
            allowed = allowed & known[:, None, None, :] | itself
        if not self.count_bias:
            return x, allowed, None, n_obs
        counts = x.new_ones(x.shape[:2], dtype=torch.float32)
        is_gene = tokens.input_ids >= self.first_gene_token
        counts[:, n_obs:] = torch.where(is_gene, tokens.values, 1.0)
        bias = torch.log1p(counts + EPSILON)[:, None, None, :]
        if not embed:
            bias = bias * torch.ones(length, length, device=x.device).tril(-1)
        return x, allowed, bias, n_obs

    def forward(self, tokens: TokenBatch, embed: bool = False) -> torch.Tensor:
        """Hidden states (n_cells, length, width); those at padding positions mean nothing.

        `embed`: each token's own count biases its attention to itself, as TranscriptFormer does for embeddings.
        """
        x, allowed, bias, n_obs = self.inputs(tokens, embed)
        return self.transformer(x, allowed, bias)[:, n_obs:]

    def encode(self, tokens: TokenBatch, pooling: str | None = None) -> torch.Tensor:
        """Cell embeddings (n_cells, width); the same whatever cells and padding they come with.

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
        tokens = self.read(tokens)
        return self.cell_embedding(self(tokens, embed=True), tokens, pooling)

    def read(self, tokens: TokenBatch) -> TokenBatch:
        """The tokens that go in: without `<eos>`, and at most as many as the window holds."""
        length = min(tokens.input_ids.shape[1] - self.appends_eos, self.max_length)
        return replace(
            tokens,
            input_ids=tokens.input_ids[:, :length],
            values=tokens.values[:, :length],
            lengths=(tokens.lengths - int(self.appends_eos)).clamp(max=length),
        )

    def logits(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (m, n_tokens) of the tokens that follow flat positions (m) of hidden states (n, length, width)."""
        assert self.head is not None
        asked = hidden.flatten(0, 1).index_select(0, positions)
        return self.head(asked, self.embedding.tokens)

    def expression(
        self, hidden: torch.Tensor, positions: torch.Tensor, genes: torch.Tensor, tokens: TokenBatch
    ) -> torch.Tensor:
        """Outputs (m, n_outputs) for the values of the genes `genes` (m) that follow flat positions (m).

        Those of a `CountHead` are scores, which `objectives.counts.count_rates` makes rates of.
        """
        assert self.expression_head is not None
        asked = hidden.flatten(0, 1).index_select(0, positions)
        vectors = self.embedding.genes(genes)
        if isinstance(self.expression_head, CountHead):
            return self.expression_head(asked, vectors, genes)
        return self.expression_head(asked, vectors, tokens.obs, positions // hidden.shape[1])
