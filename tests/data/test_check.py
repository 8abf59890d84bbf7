"""What a matrix holds is recognised, and the report and the errors say what to do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import sparse

from scmodelforge.config import DataConfig, Split, TokenizerConfig
from scmodelforge.config_io import starter_yaml
from scmodelforge.data.check import check, check_data
from scmodelforge.data.sources import open_matrix
from scmodelforge.data.split import split_cells
from scmodelforge.data.state import matrix_state, require_counts
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError
from tests.data.files import NO_MINIMUM, make_adata
from tests.helpers import make_vocab

COUNTS = np.random.default_rng(0).negative_binomial(1, 0.3, size=(60, 40))
NORMALIZED = COUNTS / COUNTS.sum(axis=1, keepdims=True) * 10_000
LOG1P = np.log1p(NORMALIZED)
VOCAB = make_vocab(30)


def adata_of(values, **layers):
    adata = make_adata(np.asarray(values), np.arange(values.shape[1]))
    for name, layer in layers.items():
        adata.layers[name] = sparse.csr_matrix(layer.astype(np.float32))
    return adata


def broken(value, count=1):
    values = COUNTS.astype(float)
    values[3, :count] = value
    return values


@pytest.mark.parametrize(
    ("values", "kind", "detail"),
    [
        (COUNTS, "counts", "whole numbers up to"),
        (NORMALIZED, "normalized", "each cell adds up to 10,000"),
        (NORMALIZED[:, :25], "normalized", "multiples of each cell's smallest value"),
        (LOG1P, "log1p", "log1p of 10,000 a cell"),
        (LOG1P[:, :25], "log1p", "log-transformed"),
        (LOG1P - LOG1P.mean(axis=0), "scaled", "negative values"),
        (COUNTS * np.random.default_rng(1).uniform(0.5, 9, COUNTS.shape), "fractional", "neither counts"),
        (COUNTS * 0, "empty", "zeros only"),
        (broken(np.nan), "invalid", "nan in cell 'cell3', gene 'v0'"),
        (broken(-2.0), "invalid", "negative whole numbers (-2 in cell 'cell3', gene 'v0')"),
    ],
)
def test_states(values, kind, detail):
    state = matrix_state(open_matrix(adata_of(values)))
    assert state.kind == kind
    assert detail in state.detail


def test_real_logarithms_are_recognised(real_data):
    assert matrix_state(open_matrix(real_data / "sciplex3_lognorm.h5ad")).kind == "log1p"


@pytest.mark.parametrize("values", [LOG1P, NORMALIZED, broken(np.nan), COUNTS * 0])
def test_counts_in_a_layer_are_pointed_to(values, tmp_path):
    adata = adata_of(values, other=LOG1P, counts=COUNTS)
    adata.write_h5ad(tmp_path / "log.h5ad")
    with pytest.raises(
        DataError,
        match=r"(?s)log\.h5ad': X does not hold raw .*data\.layer: counts \(--set data\.layer=counts\)\.",
    ):
        require_counts(open_matrix(tmp_path / "log.h5ad"))
    with pytest.raises(DataError, match=r"data\.layer: counts"):
        open_store([adata], VOCAB, NO_MINIMUM)


def test_counts_in_raw_and_in_x_are_pointed_to():
    adata = adata_of(LOG1P, normalized=NORMALIZED)
    adata.raw = adata_of(COUNTS)
    with pytest.raises(DataError, match=r"data\.layer: raw"):
        require_counts(open_matrix(adata))
    adata = adata_of(COUNTS, normalized=NORMALIZED)
    with pytest.raises(
        DataError, match=r"layer 'normalized' does not hold raw counts.*\n.*data\.layer: null"
    ):
        require_counts(open_matrix(adata, "normalized"))


def test_no_counts_anywhere():
    with pytest.raises(DataError, match=r"(?s)log-transformed.*No layer and no \.raw of it holds raw counts"):
        require_counts(open_matrix(adata_of(LOG1P)))


def test_models_of_expression_may_open_logarithms():
    store = open_store([adata_of(LOG1P)], VOCAB, NO_MINIMUM, require_counts=False)
    assert store.read(np.arange(3)).n_cells == 3


def test_report_of_good_cells():
    values = np.vstack([COUNTS, np.zeros((2, 40), int), [[0] * 39 + [5]]])
    adata = adata_of(values)
    adata.obs["cell_type"] = ["T"] * 40 + ["B"] * 20 + [None] * 3
    adata.obs["donor_id"] = [f"d{i % 4}" for i in range(63)]
    adata.obs["barcode"] = [f"b{i}" for i in range(63)]
    report = check_data(adata, VOCAB, NO_MINIMUM)
    assert (report.n_cells, report.n_genes, report.problems) == (63, 40, [])
    assert (report.n_empty, report.n_without_genes) == (2, 3)
    assert report.share == pytest.approx(COUNTS[:, :30].sum() / values.sum())
    assert report.library_size["median"] == np.median(values.sum(axis=1))
    assert report.genes_per_cell["max"] == (COUNTS[:, :30] > 0).sum(axis=1).max()
    assert report.columns["cell_type"] == {"T": 40, "B": 20, "(missing)": 3}
    assert "barcode" not in report.columns
    assert (report.suggestions.label_key, report.suggestions.group_key) == ("cell_type", "donor_id")
    text = "\n".join(report.lines())
    for part in (
        "63 cells × 40 genes",
        "X: raw counts",
        "2 values (T 40, B 20); 3 missing",
        "2 cells without any count",
    ):
        assert part in text
    assert text.endswith("Ready to train.")
    json.dumps(report.as_dict())


def test_report_of_logarithms_says_where_counts_are():
    report = check_data(adata_of(LOG1P, counts=COUNTS), VOCAB, NO_MINIMUM)
    assert report.suggestions.layer == "counts"
    assert "set data.layer: counts" in report.problems[0]
    assert "Not ready to train" in "\n".join(report.lines())


@pytest.mark.parametrize("place", ["counts", "raw"])
def test_figures_are_of_the_counts_wherever_they_are(place):
    adata = adata_of(LOG1P)
    if place == "raw":
        adata.raw = adata_of(COUNTS)
        adata = adata[:, :20].copy()  # .raw has more genes
    else:
        adata.layers["counts"] = sparse.csr_matrix(COUNTS.astype(np.float32))
    report = check_data(adata, VOCAB, NO_MINIMUM)
    assert report.library_size["median"] == np.median(COUNTS.sum(axis=1))
    assert report.share == pytest.approx(COUNTS[:, :30].sum() / COUNTS.sum())
    assert report.n_measured == 30
    where = "layer 'counts'" if place == "counts" else "raw"
    assert f"  all that follows is of {where}, where the raw counts are:" in report.lines()
    assert "all that follows" not in "\n".join(check_data(adata_of(COUNTS), VOCAB, NO_MINIMUM).lines())
    assert f"(--set data.layer={place})" in report.problems[0]


@pytest.mark.parametrize("values", [broken(np.nan), broken(-1.0), COUNTS * 0])
def test_bad_values_are_not_said_to_be_normalized(values):
    (problem, *_) = check_data(adata_of(values), VOCAB, NO_MINIMUM).problems
    assert "before normalization" not in problem
    assert "Mend or remove these cells" in problem
    assert "before normalization" in check_data(adata_of(LOG1P), VOCAB, NO_MINIMUM).problems[0]


def test_one_cell_is_refused_as_train_refuses_it():
    adata = adata_of(COUNTS[:1])
    report = check_data(adata, VOCAB, NO_MINIMUM)
    assert "1 cell × 40 genes" in report.lines()[0]
    assert report.problems == [
        "one cell cannot be split into training and validation: give more cells, or set data.split.val_split: 0."
    ]
    with pytest.raises(DataError, match="1 cell cannot be split into training and validation"):
        split_cells(adata.obs, NO_MINIMUM.split, 0)
    alone = NO_MINIMUM.model_copy(update={"split": Split(val_split=0)})
    assert check_data(adata, VOCAB, alone).problems == []


def test_every_column_of_obs_is_named_and_doubled_names_are_counted():
    adata = adata_of(COUNTS)
    adata.obs["tissue"] = "blood"
    adata.obs["age"] = np.r_[np.nan, np.linspace(20, 80, 59)]
    adata.obs["barcode"] = [f"b{i}" for i in range(60)]
    adata.obs["empty"] = None
    adata.obs["sex"] = ["f", "m"] * 30
    adata.obs_names = ["same"] * 3 + [f"cell{i}" for i in range(57)]
    text = "\n".join(check_data(adata, VOCAB, NO_MINIMUM).lines())
    said = "tissue ('blood' throughout), age (numbers from 20 to 80, 1 missing), barcode (60 values), empty (nothing)"
    assert f"  other columns of obs: {said}" in text
    assert "obs['sex']: 2 values" in text
    assert "3 cells with a name (obs_names) that another cell has too" in text
    assert "another cell has too" not in "\n".join(check_data(adata_of(COUNTS), VOCAB, NO_MINIMUM).lines())


def test_values_that_look_like_no_label_are_said(caplog):
    adata = adata_of(COUNTS)
    adata.obs["cell_type"] = ["T"] * 30 + ["B"] * 20 + ["unknown"] * 9 + ["Doublet"]
    adata.obs["sex"] = ["f", "unknown"] * 30  # no column of labels
    check_data(adata, VOCAB, NO_MINIMUM)
    (said,) = caplog.messages
    assert "obs['cell_type'] 'unknown' (9 cells), obs['cell_type'] 'Doublet' (1 cell)." in said
    assert "finetune.drop_unlabelled: true" in said
    assert "'sex'" not in said


def test_report_finds_what_the_sample_misses():
    values = np.ones((5000, 4))
    values[17, 2], values[18, 1] = -3, 0.5
    (problem,) = check_data(make_adata(values, np.arange(4)), VOCAB, NO_MINIMUM).problems
    assert "2 values of X are no counts" in problem
    assert "-3 in cell 'cell17', gene 'v2'" in problem


def test_report_of_the_wrong_species_names_the_right_vocabulary(real_data):
    path = real_data / "mouse_brain_merfish.h5ad"
    report = check(path, DataConfig())
    assert "set data.gene_vocab: mouse_protein_coding" in report.problems[0]
    assert report.suggestions.gene_vocab == "mouse_protein_coding"
    assert "mouse_protein_coding" in starter_yaml(path, report.suggestions)


def test_real_report(real_data):
    report = check(real_data / "gut_crohns_kong.h5ad", DataConfig())
    assert report.problems == []
    assert report.suggestions.label_key == "cell_type"
    assert report.suggestions.group_key == "donor"
    assert report.suggestions.batch_key == "batch"
    assert report.share > 0.9


def test_tokens_per_cell_follow_the_tokenizer():
    report = check_data(adata_of(COUNTS), VOCAB, NO_MINIMUM)

    def line(**tokenizer):
        return next(text for text in report.lines(TokenizerConfig(**tokenizer)) if "tokens per cell" in text)

    most = min(int((COUNTS[:, :30] > 0).sum(axis=1).max()), 19) + 1
    assert line(max_genes=20).endswith(f"max {most}")
    assert line(max_genes=20, include_zero_genes=True).endswith(f"max {most}"), "ranks have no zeros"
    bins = {"strategy": "binned_expression", "include_zero_genes": True}
    assert line(**bins) == "  tokens per cell, at most 2,048: 31, with the genes without a count"
    assert line(max_genes=20, **bins) == "  tokens per cell, at most 20: 20, with the genes without a count"
    report = check_data(adata_of(COUNTS), make_vocab(100), NO_MINIMUM)
    assert "  vocabulary genes measured: 40 of 100" in report.lines()
    assert line(**bins) == "  tokens per cell, at most 2,048: 41, with the genes without a count"
