"""Masked prediction on the bidirectional encoder: genes, values, or both."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch

from scmodelforge.config import Config
from scmodelforge.data.batch import ALL_MEASURED
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.embeddings import MASKED_VALUE
from scmodelforge.models.objectives.batch import (
    LossTerm,
    ModelOutput,
    PackedBatch,
    Sizes,
    TrainingBatch,
    pack,
)
from scmodelforge.models.objectives.expression import expression_terms, predicted_values
from scmodelforge.models.objectives.kernels import mask_tokens
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
    from scmodelforge.models.encoder import TransformerEncoder


class MaskedPrediction:
    """Say what is hidden (BERT's masked language model; Geneformer's and scGPT's pretraining).

    `masked_gene_prediction` hides genes, `expression_reconstruction` values, `dual_prediction` both; the value is then
    told given the true gene, so that the two losses are those of p(gene) · p(value | gene).

    Of a cell's gene tokens `mask_ratio` are asked, each by its own draw. Of those, 80 % are masked, 10 % get a random
    gene (the value of another token of the cell), and 10 % stay (shares in the config). In validation all that is
    asked is masked, so no figure can be had by copying. Special tokens are neither hidden nor inserted, unless
    `reference` asks for the published collator's way, in which only `<pad>` and `<mask>` are protected and the random
    token may be any.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        task = config.model.task_like
        self.config, self.vocab = config, vocab
        self.masking, self.packing = config.tokenizer.masking, Packing.of(config, vocab)
        self.asks_genes = task != "expression_reconstruction"
        self.asks_values = task != "masked_gene_prediction"
        self.hides_values = self.asks_values or config.tokenizer.strategy_like == "rank_value"
        self.has_bins = self.asks_values and config.tokenizer.strategy_like == "binned_expression"
        self.terms = term_names(config)
        self.sums = (
            *(f"{name}_{part}" for name in self.terms for part in ("total", "count")),
            *(GENE_SUMS if self.asks_genes else ()),
            *(VALUE_SUMS if self.asks_values else ()),
            *(BIN_SUMS if self.has_bins else ()),
        )
        known = np.ones(vocab.n_genes, dtype=bool) if vocab.medians is None else np.isfinite(vocab.medians)
        # A gene that no cell brings would give itself away as inserted.
        self.random_tokens = np.flatnonzero(known) + vocab.first_gene_token
        if self.masking.reference:
            self.random_tokens = np.arange(vocab.n_tokens)

    def corrupt(self, tokens: TokenBatch, seed: int, epoch: int, batch_seed: int = 0) -> TrainingBatch:
        """Hide tokens; a pure function of (seed, epoch, cell, position)."""
        masking, vocab = self.masking, self.vocab
        truth, values = tokens.input_ids.numpy(), tokens.values.numpy()
        shown_genes = np.empty_like(truth) if self.asks_genes else truth
        shown_values = np.empty_like(values) if self.hides_values else values
        positions = np.empty(truth.size, dtype=np.int64)
        # The published collator inserts any token.
        measured = (None if masking.reference else tokens.measured) or ALL_MEASURED
        n_asked = mask_tokens(
            truth,
            values,
            tokens.lengths.numpy(),
            tokens.cell_index.numpy(),
            np.uint64(seed),
            np.uint64(epoch),
            0 if masking.reference else vocab.first_gene_token,
            np.array([vocab.pad_id, vocab.mask_id]),
            masking.mask_ratio,
            1.0 if epoch == VALIDATION_EPOCH else masking.mask_token_share,
            masking.random_share,
            vocab.mask_id,
            self.random_tokens,
            measured.sets,
            measured.of_cell,
            vocab.first_gene_token,
            np.float32(MASKED_VALUE),
            self.asks_genes,
            self.hides_values,
            shown_genes,
            shown_values,
            positions,
        )
        positions = positions[:n_asked].copy()  # without the room for all
        return TrainingBatch(
            tokens=replace(
                tokens,
                input_ids=torch.from_numpy(shown_genes),
                values=torch.from_numpy(shown_values),
            ),
            asked=torch.from_numpy(positions),
            genes=torch.from_numpy(truth.ravel()[positions]),
            values=torch.from_numpy(values.ravel()[positions]),
            n_tokens=int(tokens.lengths.sum()),
            seed=batch_seed,
        )

    def pack(self, batch: TrainingBatch | PackedBatch, **sizes: Unpack[Sizes]) -> PackedBatch:
        """The batch as the model takes it; for `sizes` see `batch.pack`."""
        return pack(batch, self.packing, self.vocab.pad_id, **sizes)

    def __call__(self, model: TransformerEncoder, batch: TrainingBatch | PackedBatch) -> ModelOutput:
        """Mean cross-entropy of the genes and expression loss of the values, over the asked positions."""
        batch, objective = self.pack(batch), self.config.model.objective
        read = self._read(model, batch)
        hidden = model(batch.tokens) if read is None else model(batch.tokens, read)
        asked = batch.genes != self.vocab.pad_id
        genes = expression = None
        terms: dict[str, LossTerm] = {}
        if self.asks_genes:
            genes = model.genes_at(hidden, batch.asked)
            total = genes.cross_entropy(batch.genes, self.vocab.pad_id)
            terms["gene"] = LossTerm(total, asked.sum(), objective.gene_weight)
        if self.asks_values:
            expression = model.expression(hidden, batch.asked, batch.genes, batch.tokens)
            terms |= expression_terms(self.config, expression, batch.values, asked)
        terms |= model.auxiliary_terms(hidden, batch)
        return ModelOutput(hidden, genes, expression, terms)

    def _read(self, model: TransformerEncoder, batch: PackedBatch) -> torch.Tensor | None:
        """Places of hidden states that are read: the asked ones, where sizes may change from batch to batch."""
        changes = not (torch.compiler.is_compiling() or batch.asked.is_cuda)
        if changes and getattr(model, "leaves_out_unread", False):
            return batch.asked[: batch.n_asked].sort().values
        return None

    def count(self, output: ModelOutput, batch: TrainingBatch | PackedBatch) -> torch.Tensor:
        """float64: the figures named in `sums`."""
        batch = self.pack(batch)
        parts, asked = [term_sums(output, self.terms)], slice(batch.n_asked)
        if output.genes is not None:
            parts.append(gene_sums(output.genes, batch.genes[asked]))
        if output.expression is not None:
            predicted = predicted_values(self.config, output.expression[asked])
            values = batch.values[asked]
            parts.append(value_sums(predicted, values, batch.cell[asked], batch.tokens.n_cells))
            if self.has_bins:
                parts.append(bin_sums(predicted, values))
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
        return metrics


def loss_metrics(config: Config, terms: tuple[str, ...], sums: dict[str, float]) -> dict[str, float]:
    """The whole loss and, where there are several terms, each of them; NaN for the mean of nothing.

    A term that nothing was asked of, such as the batches of cells that are all of unknown ones, adds nothing.
    """
    weights = term_weights(config)
    asked = [name for name in terms if sums[f"{name}_count"]]
    means = dict.fromkeys(terms, float("nan"))
    means |= {name: sums[f"{name}_total"] / sums[f"{name}_count"] for name in asked}
    loss = {"loss": sum(weights[name] * means[name] for name in asked) if asked else float("nan")}
    return loss | ({f"{name}_loss": mean for name, mean in means.items()} if len(terms) > 1 else {})


def term_names(config: Config) -> tuple[str, ...]:
    """Names of the loss terms of a masked or generative task."""
    task, objective = config.model.task_like, config.model.objective
    asked = {
        "gene": task != "expression_reconstruction",
        "expression": task != "masked_gene_prediction",
        "nonzero": objective.zero_probability,
        "second_pass": objective.second_pass_weight
        and config.model.architecture_like == "autoregressive_transformer",
        "cell_expression": objective.cell_weight,
        "cell_nonzero": objective.cell_weight and objective.zero_probability,
        "ecs": objective.ecs_weight,
        "batch": objective.batch_weight,
    }
    return tuple(name for name, wanted in asked.items() if wanted)


def term_weights(config: Config) -> dict[str, float]:
    """Weight of each loss term by its name."""
    objective = config.model.objective
    return {
        "gene": objective.gene_weight,
        "expression": objective.value_weight,
        "nonzero": objective.value_weight,
        "second_pass": objective.second_pass_weight,
        "cell_expression": objective.cell_weight,
        "cell_nonzero": objective.cell_weight,
        "ecs": objective.ecs_weight,
        "batch": objective.batch_weight,
    }
