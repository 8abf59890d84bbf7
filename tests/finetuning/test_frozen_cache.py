"""Embeddings of a frozen backbone are computed once, and nothing that is learned or measured tells."""

from __future__ import annotations

import errno
import io
import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from scmodelforge.config import Config, Sampling, TokenizerConfig
from scmodelforge.errors import DataError
from scmodelforge.finetuning import frozen, run
from scmodelforge.finetuning.frozen import embeds_once, frozen_epochs
from scmodelforge.finetuning.run import finetune
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.bundle import read_checkpoint
from scmodelforge.tokenizers.base import build_tokenizer, what_differs_by_epoch
from scmodelforge.training.callbacks import LastCheckpoint
from scmodelforge.training.run import RunResult, train
from tests.helpers import finetune_config, make_cells, make_vocab, marker_cells, tiny_config

CELLS = marker_cells()
SHOWN = 60  # validation cells, which the best model embeds for the report at the end
STEPS = 6  # an epoch: 180 training cells in batches of 30
FROZEN = {
    "frozen": {"freeze_backbone": True, "head_lr": 0.1},
    "gradual": {"freeze_backbone_epochs": 2},
    "adapters": {"freeze_backbone_epochs": 2, "lora": {"enabled": True}},
    "regression": {
        "freeze_backbone": True,
        "label_key": "age",
        "head": {"task": "regression", "dropout": 0.3},
    },
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, which a frozen backbone must not have."""
    folder = tmp_path_factory.mktemp("backbone")
    result = train(tiny_config(folder, model={"dropout": 0.2}, training={"max_epochs": 1}), data=CELLS)
    return result.run_dir / "model"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Fills with the cells of each pass through the backbone, and whether it trained."""
    seen: list[tuple[int, bool]] = []
    encode = CellTransformer.encode

    def noted(self: CellTransformer, tokens, pooling=None):
        seen.append((tokens.n_cells, self.training))
        return encode(self, tokens, pooling)

    monkeypatch.setattr(CellTransformer, "encode", noted)
    return seen


def uncached(monkeypatch: pytest.MonkeyPatch, *arguments, **keywords) -> RunResult:
    """The same run with the backbone at work in every epoch."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "embeds_once", lambda *_: False)
        return finetune(*arguments, **keywords)


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return read_checkpoint(result.checkpoint_dir / "last.ckpt")["state_dict"]


def same_run(one: RunResult, other: RunResult) -> None:
    first, second = weights(one), weights(other)
    for name, tensor in first.items():
        # Adam makes steps of rounding errors where a gradient is zero but for them: at the biases of keys.
        atol = 1e-6 if name.startswith("head.") else 1e-5
        np.testing.assert_allclose(tensor, second[name], rtol=0, atol=atol, err_msg=name)
    shown = ["step", "train_loss", "val_loss", "val_accuracy", "val_macro_f1", "val_mae", "val_r2"]
    tables = [pd.read_csv(result.run_dir / "metrics.csv") for result in (one, other)]
    assert len(tables[0]) == len(tables[1])
    for name in set(shown) & set(tables[0].columns):
        np.testing.assert_allclose(tables[0][name], tables[1][name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", FROZEN)
def test_head_and_metrics_are_those_of_full_passes(
    backbone: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "adapters":
        pytest.importorskip("peft")
    once, full = (finetune_config(tmp_path / n, {"save_top_k": 4}, **FROZEN[kind]) for n in ("once", "full"))
    cached = finetune(once, backbone, data=CELLS)
    same_run(cached, uncached(monkeypatch, full, backbone, data=CELLS))
    (first,) = cached.checkpoint_dir.glob("epoch=000*")
    moved = weights(cached)["head.linear.weight"] - read_checkpoint(first)["state_dict"]["head.linear.weight"]
    assert moved.abs().max() > 1e-3, "the head learned"


def test_each_cell_passes_the_frozen_backbone_once(
    backbone: Path, tmp_path: Path, encoded: list[tuple[int, bool]]
) -> None:
    finetune(finetune_config(tmp_path, **FROZEN["frozen"]), backbone, data=CELLS)
    assert sum(n for n, _ in encoded) == CELLS.n_obs + SHOWN
    assert not any(training for _, training in encoded)


def test_after_the_frozen_epochs_every_batch_passes_the_backbone(
    backbone: Path, tmp_path: Path, encoded: list[tuple[int, bool]]
) -> None:
    config = finetune_config(tmp_path, {"max_epochs": 5}, freeze_backbone_epochs=2)
    finetune(config, backbone, data=CELLS)
    assert sum(n for n, training in encoded if training) == 3 * 180
    assert sum(n for n, training in encoded if not training) == CELLS.n_obs + 3 * 60 + SHOWN, (
        "and validation cells"
    )


def test_throughput_counts_cells_and_no_tokens_that_nothing_reads(backbone: Path, tmp_path: Path) -> None:
    config = finetune_config(tmp_path, freeze_backbone_epochs=2)
    table = pd.read_csv(finetune(config, backbone, data=CELLS).run_dir / "metrics.csv").set_index("step")
    per_second = table[["cells_per_second", "tokens_per_second"]].dropna()
    assert (per_second["cells_per_second"] > 0).all()
    assert (per_second["tokens_per_second"].loc[: 2 * STEPS] == 0).all()
    assert (per_second["tokens_per_second"].loc[2 * STEPS + 1 :] > 0).all()


@pytest.mark.parametrize("stop_at", [1, STEPS, 2 * STEPS - 1, 2 * STEPS, 2 * STEPS + 2])
def test_a_resumed_run_ends_with_the_same_bits(
    backbone: Path, tmp_path: Path, stop_at: int, encoded: list[tuple[int, bool]]
) -> None:
    training = {"checkpoint_every_n_steps": 1, "max_epochs": 3}
    save = LastCheckpoint._save

    def save_and_copy(self, trainer):
        save(self, trainer)
        if trainer.global_step == stop_at:
            shutil.copy(self.path, tmp_path / "stopped.ckpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", save_and_copy)
        config = finetune_config(tmp_path / "whole", training, **FROZEN["gradual"])
        whole = finetune(config, backbone, data=CELLS)
    encoded.clear()
    config = finetune_config(tmp_path / "resumed", training, **FROZEN["gradual"])
    resumed = finetune(config, backbone, data=CELLS, resume=tmp_path / "stopped.ckpt")
    first, second = weights(whole), weights(resumed)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    embedded = SHOWN + (CELLS.n_obs if stop_at < 2 * STEPS else 0)
    assert sum(n for n, training in encoded if not training) == embedded + 60, "none without need"


def test_sampled_and_repeated_cells_find_their_embeddings(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name in ("once", "full"):
        config = finetune_config(tmp_path / name, **FROZEN["frozen"])
        sampling = Sampling(label_key="cell_type", cells_per_epoch=400)
        config = config.model_copy(update={"data": config.data.model_copy(update={"sampling": sampling})})
        results.append(
            finetune(config, backbone, data=CELLS)
            if name == "once"
            else uncached(monkeypatch, config, backbone, data=CELLS)
        )
    same_run(*results)


def test_embeddings_too_large_for_memory_lie_in_the_run_folder_and_leave_nothing(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = finetune(finetune_config(tmp_path / "memory", **FROZEN["frozen"]), backbone, data=CELLS)
    monkeypatch.setattr(frozen, "IN_MEMORY", 0)
    monkeypatch.setattr(frozen, "BLOCK_CELLS", 90)  # whole batches, so that the sums are the same
    mapped, kinds = frozen._kept, []

    def noted(*arguments):
        kinds.append(mapped(*arguments))
        return kinds[-1]

    monkeypatch.setattr(frozen, "_kept", noted)
    on_disk = finetune(finetune_config(tmp_path / "disk", **FROZEN["frozen"]), backbone, data=CELLS)
    assert isinstance(kinds[0], np.memmap)
    assert kinds[0].shape == (CELLS.n_obs, 16)
    for name, tensor in weights(in_memory).items():
        assert torch.equal(tensor, weights(on_disk)[name]), name
    left = [{path.name for path in (tmp_path / name).iterdir()} for name in ("memory", "disk")]
    assert left[0] == left[1]


def test_a_full_disk_is_said_in_one_sentence(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(frozen, "IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: FullDisk())
    with pytest.raises(DataError) as error:
        finetune(finetune_config(tmp_path / "run", **FROZEN["frozen"]), backbone, data=CELLS)
    assert str(error.value) == (
        f"The embeddings of 240 cells need 0.0 GiB in '{tmp_path / 'run'}', and cannot be written: No space left on "
        "device.\nMake room there, or choose another training.run_dir."
    )


def test_tokens_that_change_keep_the_backbone_at_work_and_that_is_said(
    tmp_path: Path, encoded: list[tuple[int, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(
        tmp_path / "scgpt", tokenizer={"strategy": "binned_expression"}, training={"max_epochs": 1}
    )
    model = train(config, data=CELLS).run_dir / "model"
    encoded.clear()
    with caplog.at_level(logging.INFO, "scmodelforge"):
        finetune(finetune_config(tmp_path / "run", **FROZEN["frozen"]), model, data=CELLS)
    assert (
        "The frozen backbone reads all cells in each epoch, because their tokens differ: binned_expression spreads "
        "equal values over their bins at random." in caplog.messages
    )
    assert sum(n for n, _ in encoded) == 180 + 4 * CELLS.n_obs + SHOWN, (
        "for the scale of the head, then four epochs"
    )


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        ({"strategy": "rank_value", "max_genes": 8}, ""),
        ({"strategy": "binned_expression"}, "binned_expression spreads equal values"),
        ({"strategy": "continuous_projection"}, ""),
        ({"strategy": "continuous_projection", "max_genes": 41}, ""),
        ({"strategy": "continuous_projection", "max_genes": 40}, "tokenizer.overlong: sample draws genes"),
        ({"strategy": "continuous_projection", "max_genes": 40, "overlong": "first"}, ""),
        ({"strategy": "continuous_projection", "gene_order": "random"}, "tokenizer.gene_order is random"),
        ({"strategy": "continuous_projection", "gene_order": "value"}, ""),
    ],
)
def test_tokens_are_said_to_differ_by_epoch_where_they_do(tokenizer: dict, reason: str) -> None:
    config = Config(tokenizer=TokenizerConfig(**tokenizer))
    vocab = make_vocab(40)
    assert what_differs_by_epoch(config, vocab).startswith(reason)
    assert bool(what_differs_by_epoch(config, vocab)) is bool(reason)
    cells = make_cells(np.random.default_rng(0).integers(1, 9, (3, 40)))
    one, other = (build_tokenizer(config, vocab)(cells, 5, epoch) for epoch in (0, 1))
    same = torch.equal(one.input_ids, other.input_ids) and torch.equal(one.values, other.values)
    assert same is not bool(reason)


@pytest.mark.parametrize(
    ("training", "finetuning", "sampling", "epochs", "once"),
    [
        ({}, {}, None, 0, False),
        ({}, {"freeze_backbone": True}, None, 4, True),
        ({}, {"freeze_backbone_epochs": 1}, None, 1, True),
        ({}, {"freeze_backbone_epochs": 9}, None, 4, True),
        ({"max_steps": 5}, {"freeze_backbone": True}, None, 4, False),
        ({"max_steps": 6}, {"freeze_backbone": True}, None, 4, True),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, {"freeze_backbone": True}, None, 4, True),
        ({}, {"freeze_backbone": True}, Sampling(cells_per_epoch=44), 4, False),
        ({}, {"freeze_backbone": True}, Sampling(cells_per_epoch=45), 4, True),
    ],
)
def test_cells_are_embedded_once_where_frozen_epochs_draw_as_many(
    tmp_path: Path, training: dict, finetuning: dict, sampling: Sampling | None, epochs: int, once: bool
) -> None:
    config = finetune_config(tmp_path, training, **finetuning)
    config = config.model_copy(update={"data": config.data.model_copy(update={"sampling": sampling})})
    assert frozen_epochs(config) == epochs
    assert embeds_once(config, make_vocab(40), 180) is once
