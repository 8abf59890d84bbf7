"""Data, model, task and batches of a pretraining run, before its first step: what `train` runs and `plan` measures."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from anndata import AnnData

from scmodelforge.config import Config
from scmodelforge.data.batch import CellBatch
from scmodelforge.errors import ConfigError
from scmodelforge.genes.embeddings import read_gene_embeddings
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.bundle import (
    CHECKPOINT_KEY,
    ModelBundle,
    build_model,
    config_of,
    load_model,
    with_gene_width_of,
)
from scmodelforge.models.embeddings import ExternalGenes
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.batch import Objective, PackedBatch, Sizes
from scmodelforge.tokenizers.base import Tokenizer, build_tokenizer
from scmodelforge.training.data import TrainingData, prepare_data, prepare_given
from scmodelforge.training.module import PretrainingModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretraining:
    """A run that is ready to start.

    Attributes
    ----------
    bundle
        The model before its first step, and the config with what the data decided.
    prepared
        The cells.
    tokenizer, task
        What makes the batches.
    """

    bundle: ModelBundle
    prepared: TrainingData
    tokenizer: Tokenizer
    task: Objective

    @property
    def module(self) -> PretrainingModule:
        """What Lightning trains."""
        return PretrainingModule(self.bundle, self.bundle.config.training, self.task)

    def make_batch(self, cells: CellBatch, epoch: int, batch_seed: int) -> PackedBatch:
        """Tokens with some of them hidden, packed; a pure function of seed, epoch and cells."""
        seed, sizes = self.bundle.config.training.seed, fixed_sizes(self.bundle.config)
        hidden = self.task.corrupt(self.tokenizer(cells, seed, epoch), seed, epoch, batch_seed)
        return self.task.pack(hidden, **sizes)

    def announce(self) -> None:
        """Say what there is to train, and on what."""
        for line in self.prepared.store.describe():
            log.info(line)
        log.info(
            "%s training and %s validation cells, %s genes, %s parameters.",
            f"{len(self.prepared.train_rows):,}",
            f"{len(self.prepared.val_rows):,}",
            f"{self.bundle.vocab.n_genes:,}",
            f"{self.bundle.n_parameters:,}",
        )
        if self.bundle.config.model.attention_dropout > 0:
            log.warning(
                "model.attention_dropout is %g: the fast attention kernels know no dropout, so that training takes "
                "about twice as long, and more memory. Set it to 0 unless you reproduce a published recipe.",
                self.bundle.config.model.attention_dropout,
            )


def fixed_sizes(config: Config) -> Sizes:
    """What batches are filled up to, so that their sizes hardly change from step to step.

    With `training.tokens_per_batch` that is the budget, and as many questions as masking asks in nearly all batches.
    What a task asks beside its tokens (generated and reconstructed genes) varies, and so do the sizes then.
    """
    total = config.training.token_budget
    architecture, task = config.model.architecture_like, config.model.task_like
    generates = architecture == "autoregressive_transformer" and task == "expression_reconstruction"
    if architecture == "masked_autoencoder" or generates:
        return {}
    if total is None:
        return {"n_asked": 1}
    if architecture == "autoregressive_transformer":
        return {"total": total, "n_asked": total}
    share = config.tokenizer.masking.mask_ratio
    expected = total * share
    return {"total": total, "n_asked": math.ceil(expected + 4 * math.sqrt(expected * (1 - share)))}


def with_budget(config: Config, tokens: int | None) -> Config:
    """The config with another `training.tokens_per_batch`."""
    return config.model_copy(
        update={"training": config.training.model_copy(update={"tokens_per_batch": tokens})}
    )


def set_up(
    config: Config,
    data: AnnData | None = None,
    given: ModelBundle | None = None,
    resumed: dict[str, Any] | None = None,
    where: str = "",
) -> Pretraining:
    """Read the data and build the model.

    Parameters
    ----------
    config
        The whole config.
    data
        Cells in memory instead of `data.paths`.
    given
        A model to start from, whose sections the config has.
    resumed, where
        A checkpoint to go on from, and its path for messages.

    Raises
    ------
    UserError
        If config, data or gene vectors do not allow the run.
    """
    if given is not None:
        given, prepared = prepare_given(config, data, given)
        model = given.model.train()
    else:
        plain = resumed[CHECKPOINT_KEY] if resumed else None
        prepared = prepare_data(config, data, GeneVocab.from_plain(plain["vocab"]) if plain else None)
        config, model = _start(config, prepared.vocab, resumed, where)
    bundle = ModelBundle(config, prepared.vocab, model, trained_on=given.trained_on if given else ())
    return Pretraining(
        bundle,
        prepared,
        build_tokenizer(config, prepared.vocab),
        build_objective(config, prepared.vocab),
    )


def given_model(
    config: Config, checkpoint: str | Path | None, resume: str | Path | None
) -> ModelBundle | None:
    """The model that training starts from, if there is one."""
    if checkpoint is None:
        if config.data.extend_vocab is not None and resume is None:
            raise ConfigError(
                "data.extend_vocab adds genes to a model that training starts from, and none is given (--checkpoint)."
                "\nA new model takes its genes from data.gene_vocab; from_data is all genes of the data."
            )
        return None
    given = load_model(checkpoint)
    if given.labels is not None:
        log.info("The head that predicts '%s' stays behind: pretraining has no use for it.", given.labels.key)
    return given


def _start(
    config: Config, vocab: GeneVocab, checkpoint: dict[str, Any] | None, where: str
) -> tuple[Config, CellTransformer]:
    """The model before its first step, with given gene vectors if any; and the config with their width.

    A resumed run takes the vectors from its checkpoint, with all other weights.
    """
    seed = config.training.seed
    if checkpoint is not None:
        config = with_gene_width_of(config, config_of(checkpoint, where))
        return config, build_model(config, vocab, seed)
    settings = config.model
    if settings.gene_embeddings is None:
        if settings.gene_embedding_dim is not None and not settings.train_gene_embeddings:
            raise ConfigError(
                "model.gene_embedding_dim asks for given gene vectors, but model.gene_embeddings names no file.\n"
                "Name one, set model.train_gene_embeddings: true to learn such vectors, or "
                "model.gene_embedding_dim: null to learn gene embeddings of the model's own width."
            )
        return config, build_model(config, vocab, seed)
    vectors, _ = read_gene_embeddings(settings.gene_embeddings, vocab)
    width = vectors.shape[1]
    if settings.gene_embedding_dim not in (None, width):
        raise ConfigError(
            f"model.gene_embedding_dim is {settings.gene_embedding_dim}, but the vectors in "
            f"'{settings.gene_embeddings}' have {width} numbers. Leave the key out, or use another file."
        )
    config = config.model_copy(update={"model": settings.model_copy(update={"gene_embedding_dim": width})})
    model = build_model(config, vocab, seed)
    genes = model.embedding.tokens
    assert isinstance(genes, ExternalGenes)
    genes.load_vectors(torch.from_numpy(vectors))
    return config, model
