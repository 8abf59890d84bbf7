"""Tokens of scGPT's and TranscriptFormer's own code, kept in golden files, to the last digit.

tests/parity/make_golden_scgpt_tokens.py and make_golden_transcriptformer_tokens.py made them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scmodelforge.config import Config
from scmodelforge.tokenizers.base import Tokenizer, build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import make_cells, make_vocab

GOLDEN = Path(__file__).parent / "golden"
COUNTS = {"normalize": "none", "log1p": False}
EMPTY = 5  # the cell without genes in scGPT's file


@pytest.fixture(scope="module")
def scgpt() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "scgpt_tokens.npz"))


@pytest.fixture(scope="module")
def transcriptformer() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "transcriptformer_tokens.npz"))


def scgpt_tokenizer(preprocessing: dict[str, object], **options: object) -> Tokenizer:
    section = {"strategy": "binned_expression", "bin_ties": "numpy", "vocab_layout": "scgpt"} | options
    config = Config.model_validate({"tokenizer": section, "data": {"preprocessing": preprocessing}})
    return build_tokenizer(config, make_vocab(60, layout="scgpt"))


def tokens_with_numpy_seed(tokenizer: Tokenizer, counts: np.ndarray, seed: int) -> TokenBatch:
    state = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(seed)  # noqa: NPY002
        return tokenizer(make_cells(counts))
    finally:
        np.random.set_state(state)  # noqa: NPY002


def as_scgpt(batch: TokenBatch, pad_value: float, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Gene ids and values by scGPT's numbers: specials after the genes, a value of its own at pads."""
    genes = np.full((batch.n_cells, width), 60)
    values = np.full((batch.n_cells, width), pad_value, dtype=np.float32)
    for i, length in enumerate(batch.lengths.tolist()):
        tokens = batch.input_ids[i, :length].numpy()
        genes[i, :length] = np.where(tokens >= 4, tokens - 4, 61)
        values[i, :length] = batch.values[i, :length]
    return genes, values


@pytest.mark.parametrize(("name", "preprocessing"), [("counts", COUNTS), ("logged", {})])
def test_scgpt_s_bins_and_edges(scgpt: dict[str, np.ndarray], name: str, preprocessing: dict) -> None:
    """`Preprocessor(binning=51)` on counts and on log-normalized values, with numpy's seed."""
    counts = scgpt["counts"]
    tokenizer = scgpt_tokenizer(preprocessing, include_zero_genes=True, prepend_cls=False)
    batch = tokens_with_numpy_seed(tokenizer, counts, int(scgpt["seed"]))
    np.testing.assert_array_equal(batch.values.numpy(), scgpt[f"{name}_bins"])
    rtol = 0 if name == "counts" else 1e-6  # float32
    edges = scgpt[f"{name}_edges"].astype(np.float32)
    np.testing.assert_allclose(batch.bin_edges.numpy(), edges, rtol=rtol)


@pytest.mark.parametrize(("name", "zeros"), [("nonzero", False), ("all", True)])
def test_scgpt_s_padded_batches(scgpt: dict[str, np.ndarray], name: str, zeros: bool) -> None:
    """`tokenize_and_pad_batch` with and without zeros, value 0 at `<cls>`."""
    tokenizer = scgpt_tokenizer(COUNTS, include_zero_genes=zeros, max_genes=61)
    batch = tokens_with_numpy_seed(tokenizer, scgpt["counts"], int(scgpt["seed"]))
    genes, values = as_scgpt(batch, -2, batch.input_ids.shape[1])
    np.testing.assert_array_equal(genes, scgpt[f"{name}_genes"])
    np.testing.assert_array_equal(values, scgpt[f"{name}_values"])


def test_scgpt_s_collator(scgpt: dict[str, np.ndarray]) -> None:
    """`DataCollator(sampling=False)`: bins of counts over all genes, then the first ones; value -2 at `<cls>`."""
    counts = np.delete(scgpt["counts"], EMPTY, axis=0)
    tokenizer = scgpt_tokenizer(COUNTS, overlong="first", max_genes=20, cls_value=-2.0)
    batch = tokens_with_numpy_seed(tokenizer, counts, int(scgpt["seed"]))
    genes, values = as_scgpt(batch, -2, 20)
    np.testing.assert_array_equal(genes, scgpt["collated_genes"])
    np.testing.assert_array_equal(values, scgpt["collated_values"])


def test_bins_without_numpy_s_generator_differ_at_ties_only(scgpt: dict[str, np.ndarray]) -> None:
    counts = scgpt["counts"]
    tokenizer = scgpt_tokenizer(COUNTS, bin_ties="counter", include_zero_genes=True, prepend_cls=False)
    bins, reference = tokenizer(make_cells(counts)).values.numpy(), scgpt["counts_bins"]
    np.testing.assert_array_equal(bins[1:3], reference[1:3])  # all different
    assert ((bins == 0) == (reference == 0)).all()
    assert (bins != reference).any()


@pytest.mark.parametrize("name", ["column", "zeros", "sorted"])
def test_transcriptformer_s_batches(transcriptformer: dict[str, np.ndarray], name: str) -> None:
    """`process_batch`: counts clipped at 30, expressed genes first, in column order or by count, cut."""
    section = {
        "strategy": "continuous_projection",
        "vocab_layout": "transcriptformer",
        "prepend_cls": False,
        "max_genes": 24,
        "max_value": 30.0,
        "overlong": "first",
        "gene_order": "value" if name == "sorted" else "column",
        "include_zero_genes": name == "zeros",
    }
    config = Config.model_validate({"tokenizer": section, "data": {"preprocessing": COUNTS}})
    counts = transcriptformer["counts"]
    batch = build_tokenizer(config, make_vocab(50, layout="transcriptformer"))(make_cells(counts))
    tokens, values = transcriptformer[f"{name}_tokens"], transcriptformer[f"{name}_counts"]
    np.testing.assert_array_equal(batch.values.numpy(), values)
    equal = np.zeros(values.shape, dtype=bool)
    if name == "sorted":  # its sort is not stable: which of several equal counts comes first is open
        ties = values[:, 1:] == values[:, :-1]
        equal[:, 1:] |= ties
        equal[:, :-1] |= ties
        equal[:, -1] = True  # an equal one may have been cut
        equal |= values == 30
    np.testing.assert_array_equal(batch.input_ids.numpy()[~equal], tokens[~equal])
    assert (~equal).sum() > 20
