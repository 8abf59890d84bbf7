"""Next gene prediction on the causal transformer: the gene that comes next, and its value (TranscriptFormer)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import torch

from scmodelforge.config import Config
from scmodelforge.errors import ConfigError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.objectives.batch import (
    LossTerm,
    ModelOutput,
    PackedBatch,
    Sizes,
    TrainingBatch,
    pack,
)
from scmodelforge.models.objectives.counts import count_nll, count_rates, expected_counts
from scmodelforge.models.objectives.expression import expression_terms, predicted_values
from scmodelforge.models.objectives.masked import loss_metrics
from scmodelforge.models.objectives.metrics import (
    BIN_SUMS,
    GENE_SUMS,
    VALUE_SUMS,
    bin_metrics,
    bin_sums,
    gene_metrics,
    gene_sums,
    term_sums,
    value_metrics,
    value_sums,
)
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import Packing

if TYPE_CHECKING:
    from scmodelforge.models.autoregressive import AutoregressiveTransformer


class NextGene:
    """Say which token comes next, and with `dual_prediction` also its value, given the true gene.

    Every token but the first is asked, `<eos>` included where cells end with it; values are asked of genes only.
    Nothing is masked and nothing is random: the model cannot look ahead. A soft cap acts before the
    cross-entropy, so the perplexity is that of the capped logits.

    With value_loss zero_truncated_poisson the outputs are rates (see `counts`): the sum of the cell's counts,
    shared out by the model. `count_nll` among the metrics is their exact negative log-likelihood.

    `objective.reference` computes the losses as TranscriptFormer's code does: in a cell that fills the window the
    last question is about `<eos>` with count 1 (its rate is still that of the gene that was there), the gene loss is
    divided by all positions of the window, padding too, and the likelihood is normalized approximately.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        model, objective = config.model, config.model.objective
        self.config, self.first_gene_token = config, vocab.first_gene_token
        self.pad_id, self.eos_id, self.packing = vocab.pad_id, vocab.eos_id, Packing.of(config, vocab)
        self.window = config.tokenizer.max_genes - 1
        self.reference = objective.reference
        if self.reference and vocab.eos_id is None:
            raise ConfigError(
                "model.objective.reference asks for <eos> at the end of a full window, which the vocabulary lacks: "
                "use tokenizer.vocab_layout transcriptformer or geneformer_v2."
            )
        self.asks_values = model.task_like == "dual_prediction"
        self.asks_genes = not self.asks_values or objective.gene_weight > 0
        self.asks_counts = self.asks_values and config.value_loss == "zero_truncated_poisson"
        self.has_bins = self.asks_values and config.tokenizer.strategy_like == "binned_expression"
        self.terms = (
            *(["gene"] if self.asks_genes else []),
            *(["expression"] if self.asks_values else []),
        )
        self.sums = (
            *(f"{name}_{part}" for name in self.terms for part in ("total", "count")),
            *(GENE_SUMS if self.asks_genes else ()),
            *(VALUE_SUMS if self.asks_values else ()),
            *(BIN_SUMS if self.has_bins else ()),
            *(["count_nll"] if self.asks_counts else []),
        )

    def corrupt(self, tokens: TokenBatch, seed: int, epoch: int, batch_seed: int = 0) -> TrainingBatch:
        """Take the last token of each cell away, and ask what follows each of the others."""
        n = max(tokens.input_ids.shape[1] - 1, 1)
        lengths = tokens.lengths - 1
        shown = torch.arange(n) < lengths[:, None]
        asked = torch.nonzero(shown.flatten())[:, 0]
        # A batch of empty cells keeps its <cls>, about which nothing is asked.
        shown[:, 0] = True
        return TrainingBatch(
            tokens=replace(
                tokens,
                input_ids=tokens.input_ids[:, :n].where(shown, self.pad_id),
                values=tokens.values[:, :n].where(shown, 0.0),
                lengths=lengths,
            ),
            asked=asked,
            genes=tokens.input_ids[:, 1:].flatten()[asked],
            values=tokens.values[:, 1:].flatten()[asked],
            n_tokens=int(tokens.lengths.sum()),
            seed=batch_seed,
        )

    def pack(self, batch: TrainingBatch | PackedBatch, **sizes: Unpack[Sizes]) -> PackedBatch:
        """The batch as the model takes it; for `sizes` see `batch.pack`."""
        return pack(batch, self.packing, self.pad_id, **sizes)

    def answers(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The token and the value (m) that count as right at each asked position."""
        if not self.reference:
            return batch.genes, batch.values
        assert self.eos_id is not None
        is_last = batch.tokens.positions[batch.asked] == self.window - 1
        genes = batch.genes.masked_fill(is_last & (batch.genes != self.pad_id), self.eos_id)
        return genes, batch.values.masked_fill(is_last, 1.0) if self.asks_counts else batch.values

    def valued(self, batch: PackedBatch) -> torch.Tensor:
        """Which of the asked positions (bool m) are asked for a value: those followed by a gene."""
        return batch.genes >= self.first_gene_token

    def __call__(self, model: AutoregressiveTransformer, batch: TrainingBatch | PackedBatch) -> ModelOutput:
        """Mean cross-entropy of the next tokens, and expression loss of the values of the genes among them.

        `expression` of the result holds rates (m, 1) of counts, or the outputs of the head.
        """
        batch, objective = self.pack(batch), self.config.model.objective
        answers, values = self.answers(batch)
        hidden = model(batch.tokens)
        genes = expression = None
        terms: dict[str, LossTerm] = {}
        if self.asks_genes:
            genes = model.genes_at(hidden, batch.asked)
            total = genes.cross_entropy(answers, self.pad_id)
            count: torch.Tensor | int = (answers != self.pad_id).sum()
            if self.reference:
                count = batch.tokens.n_cells * self.window
            terms["gene"] = LossTerm(total, count, objective.gene_weight)
        if self.asks_values:
            valued = self.valued(batch)
            expression = model.expression(hidden, batch.asked, batch.genes, batch.tokens)
            if self.asks_counts:
                n_cells = batch.tokens.n_cells
                rates = count_rates(expression[:, 0], batch.values, batch.cell, n_cells, valued)
                nll = count_nll(rates, values, self.reference).where(valued, 0.0)
                terms["expression"] = LossTerm(nll.sum(), valued.sum(), objective.value_weight)
                expression = rates[:, None]
            else:
                terms |= expression_terms(self.config, expression, values, valued)
        return ModelOutput(hidden, genes, expression, terms)

    def count(self, output: ModelOutput, batch: TrainingBatch | PackedBatch) -> torch.Tensor:
        """float64: the figures named in `sums`."""
        batch = self.pack(batch)
        genes, values = self.answers(batch)
        parts = [term_sums(output, self.terms)]
        if output.genes is not None:
            parts.append(gene_sums(output.genes, genes[: batch.n_asked]))
        if output.expression is not None:
            of = self.valued(batch)
            values, outputs = values[of], output.expression[of]
            counts = self.asks_counts
            predicted = expected_counts(outputs[:, 0]) if counts else predicted_values(self.config, outputs)
            parts.append(value_sums(predicted, values, batch.cell[of], batch.tokens.n_cells))
            if self.has_bins:
                parts.append(bin_sums(predicted, values))
            if counts:
                parts.append(count_nll(outputs[:, 0], values).sum().double()[None])
        return torch.cat(parts)

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Loss, perplexity, accuracies, errors and correlations; NaN where nothing was asked."""
        named = dict(zip(self.sums, sums.tolist(), strict=True))
        metrics = loss_metrics(self.config, self.terms, named)
        if self.asks_genes:
            metrics |= gene_metrics(named)
        if self.asks_values:
            metrics |= value_metrics(named)
        if self.has_bins:
            metrics |= bin_metrics(named)
        if self.asks_counts:
            n = named["values"]
            metrics["count_nll"] = named["count_nll"] / n if n else float("nan")
        return metrics
