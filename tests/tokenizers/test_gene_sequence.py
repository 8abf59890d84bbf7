"""Bins and values against slow versions, one cell at a time; order and sampling of the genes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scmodelforge.config import Config
from scmodelforge.data.batch import CellBatch
from scmodelforge.tokenizers.base import Tokenizer, build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.binned_expression import values_of_bins
from tests.helpers import make_cells, make_vocab

STRATEGIES = ("binned_expression", "continuous_projection")


def tokenizer_of(strategy: str, n_genes: int, raw: bool = True, **options) -> Tokenizer:
    """A tokenizer of invented genes; `raw`: it reads counts, else log-normalized values."""
    preprocessing = {"normalize": "none", "log1p": False} if raw else {}
    config = {"tokenizer": {"strategy": strategy} | options, "data": {"preprocessing": preprocessing}}
    layout = options.get("vocab_layout", "geneformer_v2")
    return build_tokenizer(Config.model_validate(config), make_vocab(n_genes, layout=layout))


def genes_of(tokenizer: Tokenizer, batch: TokenBatch, cell: int = 0) -> np.ndarray:
    """Vocabulary rows of a cell's genes, in order."""
    tokens = batch.input_ids[cell, : int(batch.lengths[cell])].numpy()
    return tokens[tokens >= tokenizer.vocab.first_gene_token] - tokenizer.vocab.first_gene_token


def values_of(tokenizer: Tokenizer, batch: TokenBatch, cell: int = 0) -> np.ndarray:
    """The values of a cell's genes, in order."""
    is_gene = batch.input_ids[cell] >= tokenizer.vocab.first_gene_token
    return batch.values[cell][is_gene].numpy()


def same(first: TokenBatch, second: TokenBatch) -> bool:
    return torch.equal(first.input_ids, second.input_ids) and torch.equal(first.values, second.values)


few = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 7, 250])  # many zeros, many ties
some_cells = st.tuples(st.integers(1, 6), st.integers(1, 40)).flatmap(
    lambda shape: hnp.arrays(np.int64, shape, elements=st.one_of(few, st.integers(0, 10_000)))
)


@st.composite
def cells_and_options(draw):
    counts = draw(some_cells)
    measured = draw(st.none() | hnp.arrays(bool, counts.shape))
    if measured is not None:
        counts = counts * measured
    options = {
        "strategy": draw(st.sampled_from(STRATEGIES)),
        "n_genes": counts.shape[1],
        "raw": draw(st.booleans()),
        "max_genes": draw(st.integers(4, 45)),
        "prepend_cls": draw(st.booleans()),
        "append_eos": draw(st.booleans()),
        "gene_order": draw(st.sampled_from(["column", "random", "value"])),
        "overlong": draw(st.sampled_from(["sample", "first"])),
        "include_zero_genes": draw(st.booleans()),
        "n_bins": draw(st.sampled_from([3, 5, 51])),
        "max_value": draw(st.sampled_from([None, 2.5])),
        "cls_value": draw(st.sampled_from([0.0, 1.0, -2.0])),
    }
    return counts, measured, options


def slow_values(counts: np.ndarray, raw: bool) -> np.ndarray:
    return counts.astype(float) if raw else np.log1p(counts / max(counts.sum(), 1) * 10_000)


def slow_bin_ranges(values: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of one cell, and the first and last bin that each gene may have."""
    edges = np.zeros(n_bins - 1)
    lowest, highest = np.zeros(len(values), int), np.zeros(len(values), int)
    expressed = values > 0
    if expressed.any():
        edges = np.quantile(values[expressed], np.linspace(0, 1, n_bins - 1))
        highest[expressed] = np.digitize(values[expressed], edges)
        below = np.digitize(values[expressed], edges, right=True)
        lowest[expressed] = np.minimum(below + 1, highest[expressed])
    return edges, lowest, highest


@given(cells_and_options())
@settings(max_examples=200, deadline=None)
def test_cells_are_those_of_the_slow_version(drawn) -> None:
    counts, measured, options = drawn
    tokenizer = tokenizer_of(**options)
    vocab, binned = tokenizer.vocab, options["strategy"] == "binned_expression"
    n_special = options["prepend_cls"] + options["append_eos"]
    room = options["max_genes"] - n_special
    batch = tokenizer(make_cells(counts, measured=measured), seed=3, epoch=2)
    for i, row in enumerate(counts):
        expected = slow_values(row, options["raw"])
        known = np.ones(len(row), bool) if measured is None else measured[i]
        allowed = known if options["include_zero_genes"] else row > 0
        n_genes = int(allowed.sum())
        length = int(batch.lengths[i])
        assert length == min(n_genes, room) + n_special
        assert (batch.input_ids[i, length:] == vocab.pad_id).all()
        assert (batch.values[i, length:] == 0).all()
        if options["prepend_cls"]:
            assert (batch.input_ids[i, 0], batch.values[i, 0]) == (vocab.cls_id, options["cls_value"])
        if options["append_eos"]:
            assert batch.input_ids[i, length - 1] == vocab.eos_id

        genes, values = genes_of(tokenizer, batch, i), values_of(tokenizer, batch, i)
        assert len(set(genes.tolist())) == len(genes) == length - n_special
        assert allowed[genes].all()
        without_count = (row[genes] == 0) & (not binned)  # zeros follow, where values are numbers
        sort_key = {"column": genes, "value": -expected[genes], "random": np.zeros(len(genes))}
        places = list(zip(without_count, sort_key[options["gene_order"]], strict=True))
        assert places == sorted(places)
        if options["overlong"] == "first" and options["gene_order"] != "random":
            last = (row == 0) & (not binned)
            key = np.arange(len(row)) if options["gene_order"] == "column" else -expected
            in_order = [g for g in np.lexsort((key, last)) if allowed[g]]
            assert genes.tolist() == in_order[:room]
        if without_count.any():
            assert (row[genes] > 0).sum() == (row > 0).sum()

        if binned:
            edges, lowest, highest = slow_bin_ranges(expected, options["n_bins"])
            np.testing.assert_array_equal(batch.bin_edges[i].numpy(), edges.astype(np.float32))
            assert (values >= lowest[genes]).all()
            assert (values <= highest[genes]).all()
            assert (values == np.rint(values)).all()
        else:
            clipped = np.minimum(expected, options["max_value"] or np.inf)
            np.testing.assert_allclose(values, clipped[genes], rtol=1e-6)
    assert batch.has_padding == bool((batch.lengths < batch.input_ids.shape[1]).any())


@given(cells_and_options(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_a_cell_s_tokens_do_not_depend_on_its_company(drawn, random) -> None:
    counts, measured, options = drawn
    tokenizer, cells = tokenizer_of(**options), make_cells(counts, measured=measured)
    i = random.randrange(len(counts))
    one = make_cells(counts[i : i + 1], None, i, None if measured is None else measured[i : i + 1])
    together, alone = tokenizer(cells, 1, 5), tokenizer(one, 1, 5)
    length = int(alone.lengths[0])
    assert int(together.lengths[i]) == length
    assert torch.equal(together.input_ids[i, :length], alone.input_ids[0, :length])
    assert torch.equal(together.values[i, :length], alone.values[0, :length])


@given(cells_and_options())
@settings(max_examples=50, deadline=None)
def test_where_all_genes_are_measured_nothing_changes(drawn) -> None:
    counts, _, options = drawn
    tokenizer, measured = tokenizer_of(**options), np.ones(counts.shape, bool)
    assert same(tokenizer(make_cells(counts, measured=measured)), tokenizer(make_cells(counts)))


@given(some_cells, st.booleans(), st.sampled_from([3, 5, 51]))
@settings(max_examples=200, deadline=None)
def test_bins_give_the_values_back(counts, raw, n_bins) -> None:
    tokenizer = tokenizer_of("binned_expression", counts.shape[1], raw, n_bins=n_bins, prepend_cls=False)
    batch = tokenizer(make_cells(counts))
    back = values_of_bins(batch.values, batch.bin_edges).numpy()
    for i, row in enumerate(counts):
        expected, bins = slow_values(row, raw)[genes_of(tokenizer, batch, i)], values_of(tokenizer, batch, i)
        edges = np.append(batch.bin_edges[i].numpy(), batch.bin_edges[i, -1])
        low, high = edges[bins.astype(int) - 1], edges[bins.astype(int)]
        known = low == high
        np.testing.assert_allclose(back[i, : len(bins)][known], expected[known], rtol=1e-6)
        assert (np.abs(back[i, : len(bins)] - expected) <= (high - low) / 2 + 1e-6 * high).all()
        assert (back[i, len(bins) :] == 0).all()


def test_predicted_bins_are_rounded_and_clamped() -> None:
    edges = torch.tensor([[1.0, 2.0, 4.0, 4.0]])
    values = values_of_bins(torch.tensor([[-1.0, 0.4, 0.6, 2.0, 3.4, 4.0, 9.0]]), edges)
    assert values.tolist() == [[0, 0, 1.5, 3, 4, 4, 4]]


def test_different_values_have_certain_bins() -> None:
    counts = np.random.default_rng(0).permutation(np.arange(1, 400))[None, :]
    tokenizer = tokenizer_of("binned_expression", 399)
    first = tokenizer(make_cells(counts), seed=0, epoch=0)
    assert same(first, tokenizer(make_cells(counts), seed=1, epoch=9))
    expected = np.digitize(counts[0], np.quantile(counts[0], np.linspace(0, 1, 50)))
    np.testing.assert_array_equal(values_of(tokenizer, first), expected)


@given(st.integers(2, 300).filter(lambda n: (n - 1) % 7), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_bins_of_counts_and_of_logarithms_are_the_same(n: int, seed: int) -> None:
    """Bins tell ranks; of such n no quantile but the ends meets a value, where rounding would decide."""
    counts = np.random.default_rng(seed).permutation(n)[None, :] + 1
    batches = [tokenizer_of("binned_expression", n, raw)(make_cells(counts)) for raw in (True, False)]
    assert same(*batches)


def test_equal_values_spread_evenly_over_the_bins_they_span() -> None:
    counts = np.tile(np.repeat([1, 5], [150, 50]), (400, 1))  # 1 is edges 0 to 36, 5 is edges 37 to 49
    tokenizer = tokenizer_of("binned_expression", 200)
    batch = tokenizer(make_cells(counts))
    _, lowest, highest = slow_bin_ranges(counts[0].astype(float), 51)
    assert (lowest[0], highest[-1]) == (1, 50)
    for gene in (0, 199):  # and so each gene by itself
        bins = batch.values[:, gene + 1].numpy()
        n = highest[gene] - lowest[gene] + 1
        seen = np.bincount(bins.astype(int), minlength=52)[lowest[gene] : highest[gene] + 1]
        assert seen.sum() == 400
        assert ((seen - 400 / n) ** 2 / (400 / n)).sum() < (n - 1) + 5 * np.sqrt(2 * (n - 1))
    ties = batch.values[:, 1:151].numpy().astype(int)
    seen = np.bincount(ties.ravel(), minlength=52)[lowest[0] : highest[0] + 1]
    expected = ties.size / (highest[0] - lowest[0] + 1)
    assert ((seen - expected) ** 2 / expected).sum() < 36 + 5 * np.sqrt(2 * 36)


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 7, 0], [2, 2, 2]])
def test_cells_of_nothing_one_gene_and_equal_values(counts: list[int]) -> None:
    tokenizer = tokenizer_of("binned_expression", 3)
    batch = tokenizer(make_cells(np.tile(counts, (600, 1))))
    n_genes = int(np.sum(np.array(counts) > 0))
    assert (batch.lengths == 1 + n_genes).all()
    assert (batch.bin_edges == max(counts)).all()
    if n_genes:
        assert set(batch.values[:, 1].tolist()) == set(range(1, 51)), "a value that is all edges has any bin"
    assert (values_of_bins(batch.values[:, 1:], batch.bin_edges) == max(counts)).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_cells_at_all(strategy: str) -> None:
    batch = tokenizer_of(strategy, 3)(make_cells(np.zeros((0, 3))))
    assert batch.input_ids.shape == (0, 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("order", ["column", "random", "value"])
def test_samples_are_fair_and_new_each_epoch(strategy: str, order: str) -> None:
    counts = np.tile(np.arange(1, 31), (600, 1))
    tokenizer = tokenizer_of(strategy, 30, max_genes=11, gene_order=order)
    cells = make_cells(counts)
    batch = tokenizer(cells, seed=0, epoch=0)
    for other in (tokenizer(cells, 0, 1), tokenizer(cells, 1, 0)):
        assert (other.input_ids[:, 1:] != batch.input_ids[:, 1:]).any(dim=1).float().mean() > 0.9
    assert same(batch, tokenizer(cells, 0, 0))
    assert same(tokenizer(cells), tokenizer(cells)), "outside of training a cell is always the same tokens"
    genes = batch.input_ids[:, 1:].numpy() - tokenizer.vocab.first_gene_token
    seen = np.bincount(genes.ravel(), minlength=30)
    assert np.abs(seen - 200).max() < 5 * np.sqrt(600 * (1 / 3) * (2 / 3))
    pairs = ((genes == 3).any(1) & (genes == 4).any(1)).sum()
    assert abs(pairs - 600 * 10 * 9 / (30 * 29)) < 40
    far = tokenizer(make_cells(counts, first_row=2**33), seed=0, epoch=0)
    assert not torch.equal(far.input_ids, batch.input_ids)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_random_order_is_a_fair_shuffle(strategy: str) -> None:
    tokenizer = tokenizer_of(strategy, 5, gene_order="random")
    batch = tokenizer(make_cells(np.full((3000, 5), 2)), epoch=0)
    genes = batch.input_ids[:, 1:].numpy() - tokenizer.vocab.first_gene_token
    for place in range(5):
        assert np.abs(np.bincount(genes[:, place]) - 600).max() < 110
    assert len(np.unique(genes, axis=0)) == 120


def test_genes_without_a_count_fill_up_or_are_drawn_alike() -> None:
    counts = np.zeros((500, 100))
    counts[:, 40:50] = 3
    options = {"include_zero_genes": True, "max_genes": 21, "prepend_cls": True}
    numbers, bins = (tokenizer_of(strategy, 100, **options) for strategy in reversed(STRATEGIES))
    batch = numbers(make_cells(counts), epoch=0)
    assert (batch.values[:, 1:11] == 3).all()
    assert (batch.values[:, 11:] == 0).all()
    assert len(np.unique(batch.input_ids[:, 11:].numpy())) == 90
    batch = bins(make_cells(counts), epoch=0)
    assert abs(float((batch.values[:, 1:] > 0).sum(dim=1).float().mean()) - 2.0) < 0.25
    assert (np.diff(batch.input_ids[:, 1:].numpy()) > 0).all()


def test_normalization_follows_the_library_size_of_all_genes() -> None:
    counts = np.array([[4, 0, 1, 5]])
    batch = tokenizer_of("continuous_projection", 4, raw=False)(make_cells(counts, np.array([10])))
    np.testing.assert_allclose(batch.values[0], np.log1p([0, 2000, 500, 2500]), rtol=1e-6)


def test_sorting_comes_before_clipping() -> None:
    tokenizer = tokenizer_of("continuous_projection", 4, gene_order="value", max_value=30)
    batch = tokenizer(make_cells(np.array([[31, 2, 900, 40]])))
    assert genes_of(tokenizer, batch).tolist() == [2, 3, 0, 1]
    assert values_of(tokenizer, batch).tolist() == [30, 30, 30, 2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_explain_shows_each_step(strategy: str) -> None:
    cells = make_cells(np.array([[6, 0, 2, 40]]), np.array([2]))
    tokenizer = tokenizer_of(strategy, 4, raw=False, include_zero_genes=True, append_eos=True, max_value=8.0)
    table = tokenizer.explain(cells)
    zeros_last = strategy == "continuous_projection"
    order = [0, 2, 3, 1] if zeros_last else [0, 1, 2, 3]
    assert table["name"].tolist() == ["<cls>", *(f"G{i}" for i in order), "<eos>"]
    genes = table.iloc[1:-1]
    assert genes["counts"].tolist() == [[6, 0, 2, 40][i] for i in order]
    full = np.log1p(np.array([6, 0, 2, 40]) / 50 * 10_000)
    assert genes["value"].tolist() == pytest.approx(np.minimum(full, 8.0 if zeros_last else np.inf)[order])
    assert table.loc[[0, 5], ["counts", "value"]].isna().all(axis=None)
    if not zeros_last:
        assert genes["bin"].tolist() == [25, 0, 1, 50]
        assert table["bin"].isna().tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("strategy", ["rank_value", *STRATEGIES])
def test_obs_columns_pass_through_and_are_shown(strategy: str) -> None:
    config = Config.model_validate(
        {"tokenizer": {"strategy": strategy, "obs_tokens": ["tissue", "assay"], "include_zero_genes": False}}
    )
    vocab = make_vocab(3).with_obs_categories({"assay": ["10x", "drop"], "tissue": ["blood"]})
    cells: CellBatch = replace(make_cells(np.array([[1, 0, 2]])), obs=np.array([[2, 0]]))
    tokenizer = build_tokenizer(config, vocab)
    assert tokenizer(cells).obs.tolist() == [[2, 0]]
    table = tokenizer.explain(cells)
    assert table["position"].tolist() == [-2, -1, 0, 1, 2]
    assert table["name"].tolist()[:3] == ["tissue: (unknown)", "assay: drop", "<cls>"]
    assert table["token"].tolist()[:2] == [0, 2]
    assert (table["gene_id"] != "").tolist() == [False, False, False, True, True]
