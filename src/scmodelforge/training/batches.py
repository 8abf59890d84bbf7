"""From a config to batches: of `training.batch_size` cells, or of `training.tokens_per_batch` tokens."""

from __future__ import annotations

import numpy as np

from scmodelforge.data.batch import CellBatch
from scmodelforge.data.budget import token_budgets, token_lengths
from scmodelforge.data.buffered import BufferedShuffle
from scmodelforge.data.module import training_order
from scmodelforge.data.order import Batches, FixedSize, InOrder
from scmodelforge.errors import ConfigError
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.training.data import TrainingData
from scmodelforge.training.setup import n_processes


def choose_batches(
    bundle: ModelBundle, prepared: TrainingData, *, read_through: bool
) -> tuple[Batches, Batches | None]:
    """Batches of the training and of the validation cells (None: none validates), for all processes.

    Every cell is read once if `read_through`, and in any case for batches of tokens, which are measured so.

    Raises
    ------
    UserError
        If a cell cannot be read or is longer than a batch, there are too few cells, or the cells cannot come in the
        order that the config asks for.
    """
    config = bundle.config
    training, world, val_rows = config.training, n_processes(config.training), prepared.val_rows
    order = training_order(prepared.store, prepared.train_rows, config.data, training.seed)
    if training.token_budget is None:
        if read_through:
            prepared.read_through()
        validation = FixedSize(InOrder(val_rows), training.batch_size, world) if len(val_rows) else None
        return FixedSize(order, training.batch_size, world), validation
    if isinstance(order, BufferedShuffle):
        raise ConfigError(
            "training.tokens_per_batch takes cells from everywhere, and "
            f"{', '.join(map(str, prepared.store.files[:3]))} is read in blocks of neighbours, shuffled within a "
            "buffer.\nMake local shards of it first (scmodelforge shard) and train on these without "
            "data.shuffle_buffer, or set training.tokens_per_batch: null."
        )
    tokenizer, n_obs = build_tokenizer(config, bundle.vocab), len(config.tokenizer.obs_tokens)

    def count(cells: CellBatch) -> np.ndarray:
        return tokenizer(cells, training.seed).lengths.numpy() + n_obs

    rows = np.sort(np.concatenate([prepared.train_rows, val_rows]))
    lengths = token_lengths(prepared.store, rows, count, training.loader_threads)
    return token_budgets(order, val_rows, lengths, training.token_budget, world)
