"""What fits together, cell by cell: it learns, it leaks nothing, and the rest is refused with a way out."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import scanpy
import torch
from examples.quickstart import counts_from_log_normalized

from scmodelforge.config import Config
from scmodelforge.config_io import parse_config
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.errors import ConfigError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.bundle import build_model
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.batch import Objective, TrainingBatch
from scmodelforge.models.transformer import Transformer
from scmodelforge.strategies import TABLE, Combination, nearest
from scmodelforge.tokenizers.base import build_tokenizer
from tests.helpers import make_cells, make_vocab

ALLOWED = [row for row in TABLE.values() if row.allowed]
REFUSED = [row for row in TABLE.values() if not row.allowed]
N_GENES = 200


def named(row: Combination) -> str:
    return f"{row.tokenizer}-{row.architecture}-{row.task}"


def causal(row: Combination) -> bool:
    """Whether the next gene is predicted; such a model hides nothing, but must not look ahead."""
    return row.architecture == "autoregressive_transformer" and row.task != "expression_reconstruction"


def each(rows: list[Combination]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=named)


@cache
def real_counts() -> np.ndarray:
    """Counts (700, N_GENES) of scanpy's PBMCs: every third gene is left out, so that genes have absent neighbours."""
    counts = counts_from_log_normalized(scanpy.datasets.pbmc68k_reduced().raw.X).toarray()
    counts = counts[:, np.argsort(-(counts > 0).mean(axis=0), kind="stable")[:N_GENES]]
    counts[:, ::3] = 0
    return counts


def config_of(row: Combination, **sections: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "tokenizer": {"strategy": row.tokenizer, "max_genes": 160, **sections.pop("tokenizer", {})},
            "model": {
                "architecture": row.architecture,
                "pretraining_task": row.task,
                "hidden_dim": 32,
                "num_layers": 2,
                "num_heads": 2,
                "dropout": 0.0,
                "decoder": {"num_layers": 1},
            },
            **sections,
        }
    )


def parts(row: Combination, **sections: Any) -> tuple[Config, GeneVocab, CellTransformer, Objective]:
    config, vocab = config_of(row, **sections), make_vocab(N_GENES)
    return config, vocab, build_model(config, vocab, seed=0), build_objective(config, vocab)


def batch_of(
    config: Config, vocab: GeneVocab, task: Objective, cells: CellBatch, epoch: int
) -> TrainingBatch:
    return task.corrupt(build_tokenizer(config, vocab)(cells, 1, epoch), 1, epoch)


@each(ALLOWED)
def test_an_allowed_combination_learns_in_20_steps_on_real_cells(row: Combination) -> None:
    config, vocab, model, task = parts(row)
    held_out = batch_of(config, vocab, task, make_cells(real_counts()[600:], first_row=600), VALIDATION_EPOCH)

    def loss() -> float:
        with torch.no_grad():
            output = task(model.eval(), held_out)
        return task.metrics(task.count(output, held_out))["loss"]

    before = loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(20):
        rows = np.arange(step * 30, (step + 1) * 30) % 600
        batch = batch_of(config, vocab, task, make_cells(real_counts()[rows], first_row=rows[0]), 0)
        optimizer.zero_grad()
        task(model.train(), batch).loss.backward()
        optimizer.step()
    assert loss() < 0.97 * before


@each(ALLOWED)
def test_every_parameter_gets_a_gradient(row: Combination) -> None:
    config, vocab, model, task = parts(row)
    batch = batch_of(config, vocab, task, make_cells(real_counts()[:40]), 0)
    task(model, batch).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


@each(ALLOWED)
def test_a_cell_s_embedding_does_not_depend_on_company(row: Combination) -> None:
    config, vocab, model, _ = parts(row)
    model.eval()
    tokenizer = build_tokenizer(config, vocab)
    with torch.no_grad():
        together = model.encode(tokenizer(make_cells(real_counts()[:8])))
        alone = torch.cat(
            [model.encode(tokenizer(make_cells(real_counts()[i : i + 1], first_row=i))) for i in range(8)]
        )
    assert together.shape == (8, model.hidden_dim)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def distinct(counts: np.ndarray) -> np.ndarray:
    """The same genes with counts that differ within a cell, in the same order: no ties."""
    return np.where(counts > 0, counts.argsort(axis=1).argsort(axis=1) + 1, 0)


def same_input(a: TrainingBatch, b: TrainingBatch) -> bool:
    tensors = [(getattr(a.tokens, f.name), getattr(b.tokens, f.name)) for f in dataclasses.fields(a.tokens)]
    return all(
        torch.equal(mine, other)
        for mine, other in tensors
        if isinstance(mine, torch.Tensor) and mine is not None
    )


@each(
    [
        row
        for row in ALLOWED
        if row.task in ("expression_reconstruction", "dual_prediction") and not causal(row)
    ]
)
@pytest.mark.parametrize("epoch", [0, VALIDATION_EPOCH])
def test_hidden_values_are_not_in_the_input(row: Combination, epoch: int) -> None:
    """The counts of a cell's hidden genes change places: what the model reads stays the same."""
    masking = {"masking": {"mask_token_share": 0.7, "random_share": 0.3}}
    config, vocab, _, task = parts(row, tokenizer=masking)
    counts = distinct(real_counts()[:20])
    batch = batch_of(config, vocab, task, make_cells(counts), epoch)
    changed = counts.copy()
    for cell in range(20):
        genes = (batch.genes[batch.cell == cell] - vocab.first_gene_token).numpy()
        genes = genes[counts[cell, genes] > 0]
        changed[cell, genes] = np.roll(counts[cell, genes], 1)
    again = batch_of(config, vocab, task, make_cells(changed), epoch)
    assert (changed != counts).sum() > 100
    assert same_input(batch, again)
    assert torch.equal(batch.asked, again.asked)
    assert not torch.equal(batch.values, again.values)


@each(
    [
        row
        for row in ALLOWED
        if row.architecture == "transformer_encoder" and row.task != "expression_reconstruction"
    ]
)
@pytest.mark.parametrize("epoch", [0, VALIDATION_EPOCH])
def test_hidden_genes_are_not_in_the_input(row: Combination, epoch: int) -> None:
    """A hidden gene's counts move to the absent gene after it: what the model reads stays the same."""
    masking = {"masking": {"mask_token_share": 0.7, "random_share": 0.3}, "gene_medians": "none"}
    config, vocab, _, task = parts(row, tokenizer=masking)
    counts = distinct(real_counts()[:20])
    batch = batch_of(config, vocab, task, make_cells(counts), epoch)
    changed, n_moved = counts.copy(), 0
    for cell in range(20):
        genes = (batch.genes[batch.cell == cell] - vocab.first_gene_token).numpy()
        movable = [g for g in genes if g + 1 < N_GENES and not counts[cell, g + 1]]
        for gene in movable:
            changed[cell, gene + 1], changed[cell, gene] = counts[cell, gene], 0
            n_moved += 1
    again = batch_of(config, vocab, task, make_cells(changed), epoch)
    assert n_moved > 20
    assert same_input(batch, again)
    assert not torch.equal(batch.genes, again.genes)


@each([row for row in ALLOWED if causal(row)])
def test_what_comes_later_changes_no_prediction(row: Combination) -> None:
    """The last gene of each cell becomes another one: no gene is predicted differently."""
    config, vocab, model, task = parts(row, tokenizer={"gene_medians": "none"})
    model.eval()
    tokens = build_tokenizer(config, vocab)(make_cells(distinct(real_counts()[:20])))
    last = tokens.lengths - 1
    cells = torch.arange(20)
    ids, values = tokens.input_ids.clone(), tokens.values.clone()
    ids[cells, last] = vocab.first_gene_token  # gene 0, which no cell has
    values[cells, last] += 1
    changed = dataclasses.replace(tokens, input_ids=ids, values=values)
    with torch.no_grad():
        batch, again = (task.corrupt(t, 1, 0) for t in (tokens, changed))
        before, after = task(model, batch), task(model, again)
    assert before.genes is not None
    assert after.genes is not None
    assert torch.equal(before.genes.logits, after.genes.logits)
    assert int((batch.genes != again.genes).sum()) == 20


@each(ALLOWED)
def test_nothing_can_be_solved_by_copying(row: Combination) -> None:
    """Without attention an untrained model only sees the asked position itself: it stays at chance."""
    config, vocab, model, task = parts(row)
    for module in model.modules():
        if isinstance(module, Transformer):
            module.forward = lambda x, *_, **__: x  # type: ignore[method-assign]
    batch = batch_of(config, vocab, task, make_cells(real_counts()[:300]), VALIDATION_EPOCH)
    with torch.no_grad():
        metrics = task.metrics(task.count(task(model.eval(), batch), batch))
    assert len(batch.asked) > 500
    if "top1_accuracy" in metrics:
        assert metrics["top1_accuracy"] < 0.04
        assert metrics["top5_accuracy"] < 0.15
    if "pearson" in metrics:
        assert abs(np.nan_to_num(metrics["pearson"])) < 0.3
        assert abs(np.nan_to_num(metrics["spearman"])) < 0.3
    if "bin_accuracy" in metrics:
        assert metrics["bin_accuracy"] < 0.1


@each(REFUSED)
def test_the_rest_is_refused_with_the_reason_and_what_works(row: Combination) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(
            {
                "tokenizer": {"strategy": row.tokenizer},
                "model": {"architecture": row.architecture, "pretraining_task": row.task},
            }
        )
    near = nearest(row.tokenizer, row.architecture, row.task)
    assert near.allowed
    assert row.refusal in str(error.value)
    for name in (near.tokenizer, near.architecture, near.task):
        assert name in str(error.value)


def test_the_table_is_whole() -> None:
    assert len(TABLE) == 36
    assert len(ALLOWED) == 16
