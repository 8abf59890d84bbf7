"""The compiled corruptions against slow twins in numpy."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.config import Config
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.data.random import below, philox, uniform
from scmodelforge.models.embeddings import MASKED_VALUE
from scmodelforge.models.objectives.generation import ExpressionGeneration
from scmodelforge.models.objectives.masked import MaskedPrediction
from scmodelforge.models.objectives.reconstruction import ZERO_STREAM, MaskedReconstruction
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import make_cells, make_vocab

VOCAB = make_vocab(40, medians=np.where(np.arange(40) % 7 == 3, np.nan, 1.0))


def slow_mask(task: MaskedPrediction, tokens: TokenBatch, seed: int, epoch: int) -> tuple[np.ndarray, ...]:
    """Shown genes, shown values and asked positions, by whole arrays."""
    masking, vocab = task.masking, task.vocab
    truth, values = tokens.input_ids.numpy(), tokens.values.numpy()
    cell = tokens.cell_index.numpy()[:, None].astype(np.uint64)
    low, high = cell & np.uint64(0xFFFFFFFF), cell >> np.uint64(32)
    choose, action, token, place = philox(seed, low, high, np.arange(truth.shape[1])[None, :], epoch)
    allowed = truth >= (0 if masking.reference else vocab.first_gene_token)
    allowed &= ~np.isin(truth, [vocab.pad_id, vocab.mask_id])
    asked = allowed & (uniform(choose) < masking.mask_ratio)
    drawn = uniform(action)
    masked = asked & ((drawn < masking.mask_token_share) | (epoch == VALIDATION_EPOCH))
    replaced = asked & ~masked & (drawn < masking.mask_token_share + masking.random_share)
    genes, shown = truth, values
    if task.asks_genes:
        inserted = task.random_tokens[below(token, len(task.random_tokens))]
        if tokens.measured is not None and not masking.reference:
            for i, of in enumerate(tokens.measured.of_cell):
                pool = task.random_tokens[
                    tokens.measured.sets[of][task.random_tokens - vocab.first_gene_token]
                ]
                inserted[i] = pool[below(token[i], len(pool))]
        genes = np.where(masked, vocab.mask_id, np.where(replaced, inserted, truth))
    if task.hides_values:
        visible = np.where(asked, np.float32(MASKED_VALUE), values)
        other = np.take_along_axis(
            visible, below(place, np.maximum(tokens.lengths.numpy(), 1)[:, None]), axis=1
        )
        shown = np.where(masked, np.float32(MASKED_VALUE), np.where(replaced, other, values))
    return genes, shown, np.flatnonzero(asked)


@given(
    st.sampled_from(
        [
            ("rank_value", "masked_gene_prediction"),
            ("binned_expression", "masked_gene_prediction"),
            ("binned_expression", "expression_reconstruction"),
            ("continuous_projection", "dual_prediction"),
        ]
    ),
    st.floats(0.01, 0.99),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from([0, 5, VALIDATION_EPOCH]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 2**32 - 2, 2**40]),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_masks_are_those_of_the_slow_version(
    kind: tuple[str, str],
    ratio: float,
    mask_share: float,
    rest: float,
    reference: bool,
    epoch: int,
    seed: int,
    row: int,
    panels: bool,
) -> None:
    strategy, task_name = kind
    masking = {
        "mask_ratio": ratio,
        "mask_token_share": mask_share,
        "random_share": (1 - mask_share) * rest,
        "reference": reference and task_name == "masked_gene_prediction",
    }
    config = Config.model_validate(
        {
            "tokenizer": {"strategy": strategy, "append_eos": True, "max_genes": 20, "masking": masking},
            "model": {"pretraining_task": task_name},
        }
    )
    counts = np.random.default_rng(seed).poisson(0.5, (6, 40))
    counts[2] = 0  # an empty cell
    measured = (np.arange(40) + np.array([[0], [0], [1], [0], [1], [1]])) % 3 > 0  # of two files
    if panels:
        counts[~measured] = 0
    cells = make_cells(counts, first_row=row, measured=measured if panels else None)
    tokens = build_tokenizer(config, VOCAB)(cells, seed, epoch)
    task = MaskedPrediction(config, VOCAB)
    before = tokens.input_ids.clone(), tokens.values.clone()
    batch = task.corrupt(tokens, seed, epoch)
    genes, values, asked = slow_mask(task, tokens, seed, epoch)
    np.testing.assert_array_equal(batch.tokens.input_ids, genes)
    np.testing.assert_array_equal(batch.tokens.values, values)
    np.testing.assert_array_equal(batch.asked, asked)
    np.testing.assert_array_equal(batch.genes, tokens.input_ids.flatten()[asked])
    np.testing.assert_array_equal(batch.values, tokens.values.flatten()[asked])
    assert torch.equal(tokens.input_ids, before[0])
    assert torch.equal(tokens.values, before[1])


def test_a_batch_of_no_cells_asks_nothing() -> None:
    config = Config()
    tokens = build_tokenizer(config, VOCAB)(make_cells(np.zeros((1, 40))))
    assert len(MaskedPrediction(config, VOCAB).corrupt(tokens, 0, 0).asked) == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_of_all_and_nothing(share: float) -> None:
    masking = {"mask_ratio": 0.5, "mask_token_share": share, "random_share": 0.0}
    config = Config.model_validate({"tokenizer": {"masking": masking}})
    tokens = build_tokenizer(config, VOCAB)(make_cells(np.ones((8, 40))))
    batch = MaskedPrediction(config, VOCAB).corrupt(tokens, 0, 0)
    shown = batch.tokens.input_ids.flatten()[batch.asked]
    assert len(shown)
    assert bool(((shown == VOCAB.mask_id) == bool(share)).all())


@numba.njit
def compiled_log1p(values: np.ndarray) -> np.ndarray:
    """numpy's own may differ from it in the last bit."""
    return np.log1p(values)


def slow_questions(task: MaskedReconstruction, tokens: TokenBatch, seed: int, epoch: int) -> list[dict]:
    """Of each cell: the asked tokens with their values."""
    first, questions = task.vocab.first_gene_token, []
    for i in range(tokens.n_cells):
        n, cell = int(tokens.lengths[i]), int(tokens.cell_index[i])
        low, high = cell & 0xFFFFFFFF, cell >> 32
        ids, values = tokens.input_ids[i, :n].numpy(), tokens.values[i, :n].numpy()
        drawn = uniform(philox(seed, low, high, ids, epoch)[0])
        asked = (ids >= first) & (values > 0) & (drawn < task.masking.mask_ratio)
        found = dict(zip(ids[asked].tolist(), values[asked].tolist(), strict=True))
        with_count = set(ids.tolist()) | set([] if tokens.left_out is None else tokens.left_out[i].tolist())
        share, token = task.zero_mask_ratio, first - 1
        jumps = uniform(philox(seed ^ ZERO_STREAM, low, high, np.arange(500), epoch)[0])
        for jump in np.floor(compiled_log1p(-jumps) / np.log1p(-share)) if share else []:
            token += 1 + int(jump)
            if token >= task.vocab.n_tokens:
                break
            known = tokens.measured is None or tokens.measured.sets[tokens.measured.of_cell[i], token - first]
            if known and task.seen[token] and token not in with_count:
                found[token] = 0.0
        questions.append(found)
    return questions


@given(
    st.floats(0.05, 0.95),
    st.sampled_from([0.0, 0.03, 0.5]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 2**32 - 2]),
    st.booleans(),
    st.sampled_from([10, 64]),
)
@settings(max_examples=60, deadline=None)
def test_reconstruction_asks_what_the_slow_version_asks(
    ratio: float, zero_ratio: float, seed: int, row: int, panel: bool, max_genes: int
) -> None:
    config = Config.model_validate(
        {
            "tokenizer": {
                "strategy": "continuous_projection",
                "max_genes": max_genes,
                "masking": {"mask_ratio": ratio},
            },
            "model": {
                "architecture": "masked_autoencoder",
                "pretraining_task": "expression_reconstruction",
                "objective": {"zero_mask_ratio": zero_ratio},
            },
        }
    )
    counts = np.random.default_rng(seed).poisson(0.7, (5, 40))
    counts[1] = 0
    measured = np.tile(np.arange(40) % 3 > 0, (5, 1))
    if panel:
        counts[~measured] = 0
    cells = make_cells(counts, first_row=row, measured=measured if panel else None)
    tokens = build_tokenizer(config, VOCAB)(cells, seed, 2)
    task = MaskedReconstruction(config, VOCAB)
    batch = task.corrupt(tokens, seed, 2)
    assert batch.queries is not None
    rows = batch.cell.numpy()
    for i, expected in enumerate(slow_questions(task, tokens, seed, 2)):
        genes = batch.genes[rows == i].tolist()
        assert genes == sorted(expected)
        assert batch.values[rows == i].tolist() == [expected[gene] for gene in genes]
        assert batch.queries[i][: len(genes)].tolist() == genes
        assert (batch.queries[i][len(genes) :] == VOCAB.pad_id).all()
        before = tokens.input_ids[i, : int(tokens.lengths[i])].tolist()
        visible = [token for token in before if expected.get(token, 0.0) == 0.0]
        assert batch.tokens.input_ids[i, : int(batch.tokens.lengths[i])].tolist() == visible


@given(st.floats(0.05, 0.95), st.integers(0, 2**32 - 1), st.sampled_from([0, 2**32 - 2]))
@settings(max_examples=60, deadline=None)
def test_generation_takes_the_genes_of_the_smallest_draws(share: float, seed: int, row: int) -> None:
    config = Config.model_validate(
        {
            "tokenizer": {"strategy": "binned_expression", "max_genes": 20},
            "model": {
                "architecture": "autoregressive_transformer",
                "pretraining_task": "expression_reconstruction",
                "objective": {"generated_share": share},
            },
        }
    )
    counts = np.random.default_rng(seed).poisson(0.7, (5, 40))
    counts[1] = 0
    tokens = build_tokenizer(config, VOCAB)(make_cells(counts, first_row=row), seed, 2)
    batch = ExpressionGeneration(config, VOCAB).corrupt(tokens, seed, 2)
    assert batch.queries is not None
    for i in range(5):
        genes = tokens.input_ids[i, 1 : int(tokens.lengths[i])].numpy()
        cell = int(tokens.cell_index[i])
        drawn = philox(seed, cell & 0xFFFFFFFF, cell >> 32, genes, 2)[0]
        taken = np.sort(np.argsort(drawn, kind="stable")[: int(len(genes) * share)])
        assert batch.queries[i][: len(taken)].tolist() == genes[taken].tolist()
        assert batch.genes[batch.cell == i].tolist() == genes[taken].tolist()
        rest = np.delete(genes, taken).tolist()
        assert batch.tokens.input_ids[i, 1 : int(batch.tokens.lengths[i])].tolist() == rest
