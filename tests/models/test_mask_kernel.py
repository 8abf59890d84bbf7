"""The compiled masking against a slow twin in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.config import Config
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.data.random import below, philox, uniform
from scmodelforge.models.embeddings import MASKED_VALUE
from scmodelforge.models.objectives.masked import MaskedPrediction
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
    tokens = build_tokenizer(config, VOCAB)(make_cells(counts, first_row=row), seed, epoch)
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
