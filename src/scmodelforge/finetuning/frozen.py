"""Embeddings of a backbone that does not train: computed once, and read in every epoch that it stays frozen.

A frozen backbone runs without dropout, so a cell whose tokens are the same in each epoch has one embedding, and only
the head is left to compute: ten such epochs cost little more than one pass of the cells through the model. Beyond
`IN_MEMORY` bytes the embeddings lie in a file without a name in the run folder, which is gone when the run ends,
however it ends.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning import Trainer

from scmodelforge.config import Config
from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.inference import embed_store
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.tokenizers.base import what_differs_by_epoch
from scmodelforge.training.setup import n_processes

log = logging.getLogger(__name__)

IN_MEMORY = 2 * 2**30  # bytes
BLOCK_CELLS = 2**18  # embedded, gathered and written at once


@dataclass(frozen=True)
class CellEmbeddings:
    """Embeddings of some cells of a store.

    Attributes
    ----------
    rows
        int64 (n), ascending: the global rows of the cells.
    vectors
        float32 (n, hidden_dim).
    """

    rows: np.ndarray
    vectors: np.ndarray

    def of(self, rows: np.ndarray) -> torch.Tensor:
        """float32 (n, hidden_dim): the embeddings of these rows, in their order."""
        return torch.from_numpy(np.array(self.vectors[np.searchsorted(self.rows, rows)]))


def frozen_epochs(config: Config) -> int:
    """Epochs of a run in which the backbone does not train, from the first one on."""
    finetune, epochs = config.finetune, config.training.max_epochs
    return epochs if finetune.freeze_backbone else min(finetune.freeze_backbone_epochs, epochs)


def embeds_once(config: Config, vocab: GeneVocab, n_train: int) -> bool:
    """Whether a run embeds its cells once for all frozen epochs, without changing what the head reads.

    It does not where tokens differ from epoch to epoch, nor where the frozen epochs draw fewer cells than there are.
    This is the same for a resumed run, which so goes on with the very same embeddings.
    """
    training, sampling = config.training, config.data.sampling
    per_epoch = (sampling.cells_per_epoch if sampling else None) or n_train
    drawn = frozen_epochs(config) * per_epoch
    if training.max_steps is not None:
        per_step = training.batch_size * training.accumulate_grad_batches * n_processes(training)
        drawn = min(drawn, training.max_steps * per_step)
    if drawn < n_train:
        return False
    if reason := what_differs_by_epoch(config, vocab):
        log.info(
            "The frozen backbone reads all cells in each epoch, because their tokens differ: %s.", reason
        )
        return False
    return True


def embed_once(
    bundle: ModelBundle, store: CellStore, rows: np.ndarray, folder: Path, trainer: Trainer
) -> CellEmbeddings:
    """Embed the cells `rows` (int64, ascending) on the trainer's device, in its precision; each rank a share of them.

    Raises
    ------
    DataError
        If embeddings that do not fit into memory cannot be written to `folder` either.
    """
    log.info("The frozen backbone embeds %s cells, once for all epochs that it is frozen.", f"{len(rows):,}")
    started = time.perf_counter()
    vectors = _kept(_blocks(bundle, store, rows, trainer), (len(rows), bundle.model.hidden_dim), folder)
    log.info("%s cells are embedded, in %.1f s.", f"{len(rows):,}", time.perf_counter() - started)
    return CellEmbeddings(rows, vectors)


def _blocks(
    bundle: ModelBundle, store: CellStore, rows: np.ndarray, trainer: Trainer
) -> Iterator[np.ndarray]:
    """Embeddings float32 (n, hidden_dim) of all rows, block by block, the same on each rank."""
    device, rank, world = trainer.strategy.root_device, trainer.global_rank, trainer.world_size
    for start in range(0, len(rows), BLOCK_CELLS):
        block = rows[start : start + BLOCK_CELLS]
        share = -(-len(block) // world)  # the same for all: the last rank repeats the last cell
        mine = block[np.minimum(np.arange(rank * share, (rank + 1) * share), len(block) - 1)]
        with trainer.precision_plugin.forward_context():
            part = embed_store(bundle, store, bundle.config.training.batch_size, None, str(device), mine)
        together = trainer.strategy.all_gather(torch.from_numpy(part).to(device))
        yield together.reshape(-1, part.shape[1])[: len(block)].cpu().numpy()


def _kept(blocks: Iterator[np.ndarray], shape: tuple[int, int], folder: Path) -> np.ndarray:
    """All blocks as one array, in memory or mapped from a file that has no name."""
    n_bytes = shape[0] * shape[1] * 4
    if n_bytes <= IN_MEMORY:
        vectors, done = np.empty(shape, np.float32), 0
        for block in blocks:
            vectors[done : done + len(block)] = block
            done += len(block)
        return vectors
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        for block in blocks:
            try:
                file.write(block.tobytes())
                file.flush()
            except OSError as error:
                raise DataError(
                    f"The embeddings of {shape[0]:,} cells need {n_bytes / 2**30:.1f} GiB in '{folder}', and cannot be "
                    f"written: {error.strerror or error}.\nMake room there, or choose another training.run_dir."
                ) from error
        return np.memmap(file, np.float32, "r", shape=shape)
