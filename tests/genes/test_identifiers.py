"""Matching: names as files spell them, real files, and what is said when nothing fits."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.errors import DataError
from scmodelforge.genes import identifiers
from scmodelforge.genes.identifiers import MEASURED, GeneMatch, likely_cause, match_genes
from scmodelforge.genes.names import reference_of
from scmodelforge.genes.vocab import GeneVocab, predefined, resolve_vocab

HUMAN = predefined("human_protein_coding")
MOUSE = predefined("mouse_protein_coding")


def frame(*names: str, **columns: list) -> pd.DataFrame:
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


def matched(match: GeneMatch, vocab: GeneVocab) -> list[str]:
    """Symbols of the matched genes, "" where there is none."""
    return [vocab.symbols[row] if row >= 0 else "" for row in match.gene_index]


# --- spellings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "symbol", "reason"),
    [
        ("ENSG00000198851", "CD3E", "Ensembl id"),
        ("ENSG00000198851.12", "CD3E", "Ensembl id"),
        ("ensg00000198851", "CD3E", "Ensembl id"),
        ("GRCh38_ENSG00000198851", "CD3E", "Ensembl id"),
        ("ENSG00000002586.20_PAR_Y", "CD99", "Ensembl id"),
        ("ENSGR0000002586.11", "CD99", "Ensembl id"),
        ("CD3E_ENSG00000198851", "CD3E", "Ensembl id"),
        ("CD3E_ENSG99999999999", "CD3E", "repaired name"),
        ("CD3E", "CD3E", "symbol"),
        ("GRCh38_CD3E", "CD3E", "repaired name"),
        ("CD99", "CD99", "symbol"),
        ("SEPT1", "SEPTIN1", "previous symbol"),
        ("HLA.A", "HLA-A", "repaired name"),
        ("cd3e", "CD3E", "other case"),
        ("C1ORF112", "FIRRM", "other case"),
        ("MALAT1", "", "not in the vocabulary: lncRNA"),
        ("ENSG00000251562", "", "not in the vocabulary: lncRNA"),
        ("Cd3e", "", "unknown name"),
        ("MATR3", "MATR3", "symbol"),
        ("QARS", "", "ambiguous symbol"),
        ("ENSG99999999999", "", "unknown Ensembl id"),
        ("ENSMUSG00000032093", "", "unknown Ensembl id"),
        ("probe_17", "", "unknown name"),
        ("", "", "no name"),
    ],
)
def test_human_names(name: str, symbol: str, reason: str) -> None:
    match = match_genes(frame(name), HUMAN)
    assert matched(match, HUMAN) == [symbol]
    assert match.table.reason.tolist() == [reason]
    assert match.gene_index.dtype == np.int32


@pytest.mark.parametrize(
    ("name", "symbol", "reason"),
    [
        ("Cd3e", "Cd3e", "symbol"),
        ("H2.K1", "H2-K1", "repaired name"),
        ("X0610010K14Rik", "0610010K14Rik", "repaired name"),
        ("Ddit3", "", "ambiguous symbol"),
        ("CD3E", "", "unknown name"),
    ],
)
def test_mouse_names(name: str, symbol: str, reason: str) -> None:
    match = match_genes(frame(name), MOUSE)
    assert matched(match, MOUSE) == [symbol]
    assert match.table.reason.tolist() == [reason]


@pytest.mark.parametrize("copy", ["TSPAN6-1", "TSPAN6.1"])
def test_duplicates_made_unique_share_the_gene(copy: str) -> None:
    match = match_genes(frame("TSPAN6", copy), HUMAN)
    assert matched(match, HUMAN) == ["TSPAN6", "TSPAN6"]
    assert (match.n_matched, match.n_genes, match.n_duplicates) == (2, 1, 1)
    assert "1 share a gene with another row and are summed" in match.summary()
    assert match_genes(frame(copy), HUMAN).n_matched == 0  # alone it is no copy of anything


# --- which column ---------------------------------------------------------------------------------


def test_ids_in_a_column_of_any_name_are_found() -> None:
    var = frame("0", "1", chromosome=["11", "X"], anything=["ENSG00000198851", "ENSG00000000003"])
    match = match_genes(var, HUMAN)
    assert (match.column, match.kind) == ("anything", "ensembl")
    assert matched(match, HUMAN) == ["CD3E", "TSPAN6"]


def test_ids_are_preferred_to_symbols() -> None:
    var = frame("CD3E", "TSPAN6", gene_ids=["ENSG00000198851", "ENSG00000000003"])
    assert match_genes(var, HUMAN).column == "gene_ids"


def test_categorical_columns_with_missing_names() -> None:
    var = frame("a", "b", feature_id=pd.Categorical(["ENSG00000198851", None]))
    match = match_genes(var, HUMAN)
    assert match.column == "feature_id"
    assert match.gene_index[1] == -1


def test_retired_and_missing_ids_are_looked_up_by_symbol() -> None:
    most = slice(100, 160)
    symbols = [*HUMAN.symbols[most], "CCL5", "MS4A1"]
    ids = [*HUMAN.gene_ids[most], "ENSG00000161570", ""]  # CCL5 had this one in GRCh37
    match = match_genes(frame(*symbols, feature_id=ids), HUMAN)
    assert match.column == "feature_id"
    assert matched(match, HUMAN) == symbols
    assert match.table.used.tolist() == [*HUMAN.gene_ids[most], "CCL5", "MS4A1"]
    assert match.table.reason.tolist() == ["Ensembl id"] * 60 + ["symbol"] * 2
    assert matched(match_genes(frame(*symbols, feature_id=ids), HUMAN, "feature_id"), HUMAN)[60:] == ["", ""]


def test_a_column_can_be_demanded() -> None:
    var = frame("CD3E", "CCL5", feature_id=["ENSG00000198851", "ENSG00000161570"])
    assert matched(match_genes(var, HUMAN, "feature_id"), HUMAN) == ["CD3E", ""]
    assert match_genes(var, HUMAN, "index").column == "index"


def test_an_unknown_column_names_the_nearest() -> None:
    var = frame("CD3E", feature_id=["ENSG00000198851"])
    with pytest.raises(DataError, match=r"'featureid'.*Did you mean 'feature_id'\?\n.*feature_id; 'index'"):
        match_genes(var, HUMAN, "featureid")


def test_a_vocabulary_of_own_names() -> None:
    vocab = resolve_vocab("from_data", [frame("probe_1", "probe_2", "CD3E")])
    match = match_genes(frame("probe_2", "probe_3", "ENSG00000198851"), vocab)
    assert matched(match, vocab) == ["probe_2", "", "CD3E"]
    assert match.table.reason.tolist() == ["own name", "unknown name", "Ensembl id"]


def test_a_vocabulary_with_yesterdays_symbols_matches_todays() -> None:
    old = HUMAN.subset(np.flatnonzero(HUMAN.symbols == "SEPTIN1"))
    old = GeneVocab(old.gene_ids, np.array(["SEPT1"], dtype=object), old.biotypes, "human")
    assert match_genes(frame("SEPTIN1", "SEPT1"), old).n_matched == 2


# --- properties -----------------------------------------------------------------------------------

rows = st.lists(st.integers(0, HUMAN.n_genes - 1), min_size=1, max_size=20, unique=True)


@settings(max_examples=25, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_the_order_of_var_does_not_matter(genes: list[int], random) -> None:
    var = pd.DataFrame(index=[*HUMAN.symbols[genes], "nobody", "MALAT1"])
    order = list(range(len(var)))
    random.shuffle(order)
    match, shuffled = match_genes(var, HUMAN), match_genes(var.iloc[order], HUMAN)
    np.testing.assert_array_equal(match.gene_index[order], shuffled.gene_index)
    assert match.table.iloc[order].reset_index(drop=True).equals(shuffled.table)


@settings(max_examples=25, deadline=None)
@given(rows, st.integers(1, 40))
def test_versions_do_not_matter(genes: list[int], version: int) -> None:
    ids = [f"{gene}.{version}" for gene in HUMAN.gene_ids[genes]]
    np.testing.assert_array_equal(match_genes(frame(*ids), HUMAN).gene_index, genes)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=10))
def test_any_text_gets_a_gene_or_a_reason(names: list[str]) -> None:
    match = match_genes(frame(*names), HUMAN)
    hit = match.gene_index >= 0
    assert len(match.table) == len(names)
    assert (match.table.gene_id[hit] == HUMAN.gene_ids[match.gene_index[hit]]).all()
    assert match.table.reason.str.len().gt(0).all()
    assert match.summary().startswith(f"matched {hit.sum()} of {len(names)} genes by symbol")


# --- what is said ---------------------------------------------------------------------------------


def test_the_summary_counts_reasons() -> None:
    var = frame("CD3E", "SEPT1", "MALAT1", "NEAT1", "XIST", "nobody")
    assert match_genes(var, HUMAN).summary() == (
        "matched 2 of 6 genes by symbol in var_names (1 previous symbol); 4 not: 3 lncRNA, 1 unknown name"
    )


@pytest.mark.parametrize(
    ("vocab", "var", "words"),
    [
        (
            MOUSE,
            frame("CD3E", "MS4A1", "NKG7"),
            ["look like human", "is mouse", "data.gene_vocab: human_protein_coding"],
        ),
        (
            HUMAN,
            frame("Cd3e", "Ms4a1", "Nkg7"),
            ["look like mouse", "is human", "data.gene_vocab: mouse_protein_coding"],
        ),
        (
            HUMAN,
            frame("ENSMUSG00000032093"),
            ["by Ensembl ids in var_names", "data.gene_vocab: mouse_protein_coding"],
        ),
        (
            HUMAN,
            frame("0", "1", "2", "3"),
            ["('0', '1', '2', …)", "neither", "data.gene_column", "from_data"],
        ),
        (
            HUMAN.subset(np.arange(5)),
            frame("CD3E", "MS4A1"),
            ["0 of them", "with 5 genes it is too small", "from_data"],
        ),
    ],
)
def test_the_likely_cause(vocab: GeneVocab, var: pd.DataFrame, words: list[str]) -> None:
    text = likely_cause(match_genes(var, vocab), vocab, var)
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("vocab", "var"),
    [
        (HUMAN, frame(*"abc")),
        (HUMAN, frame("Cd3e", "Ms4a1", "Gapdh")),
        (HUMAN.subset(np.arange(5)), frame("CD3E", "MS4A1")),
    ],
)
def test_no_other_vocabulary_is_advised_for_a_trained_model(vocab: GeneVocab, var: pd.DataFrame) -> None:
    match = match_genes(var, vocab)
    assert "set data.gene_vocab" in likely_cause(match, vocab, var).replace("Set", "set")
    text = likely_cause(match, vocab, var, of_model=True)
    assert "data.gene_vocab" not in text
    assert "trained model" in text or "genes of the model" in text


def test_the_likely_cause_of_a_wrong_column() -> None:
    var = frame("CD3E", "MS4A1", remark=["a", "b"])
    match = match_genes(var, HUMAN, "remark")
    text = likely_cause(match, HUMAN, var)
    assert "var['remark'] matches 0 genes, but var_names matches 2: set data.gene_column: index" in text


# --- real files -----------------------------------------------------------------------------------

REAL = [  # file, column, share of its genes and of its counts on protein-coding genes (floors)
    ("cell_lines_mixology", "feature_id", 0.52, 0.81),
    ("census_placenta", "feature_id", 0.82, 0.93),
    ("crispr_papalexi", "feature_id", 0.86, 0.99),
    ("gut_crohns_kong", "feature_id", 0.82, 0.96),
    ("mouse_brain_merfish", "feature_id", 0.96, 0.98),
    ("pancreas_baron_human", "feature_id", 0.93, 0.99),
    ("pancreas_baron_mouse", "feature_id", 0.87, 0.95),
    ("pancreas_baron_orthologs", "feature_id", 0.99, 0.95),
    ("pbmc3k", "feature_id", 0.58, 0.96),
    ("pbmc_frozen_a", "feature_id", 0.86, 0.96),
    ("pbmc_ifnb_kang", "feature_id", 0.87, 0.94),
    ("pbmc_kang_12k", "feature_id", 0.99, 0.92),
    ("pbmc_sorted_zheng", "index", 0.94, 0.96),
    ("sciplex3_lognorm", "index", 0.67, 0.93),
    ("tenx_v3_pbmc_sample", "gene_ids", 0.52, 0.94),
]


@pytest.mark.parametrize(("name", "column", "genes", "counts"), REAL)
def test_real_files_match(real_data: Path, name: str, column: str, genes: float, counts: float) -> None:
    adata = anndata.read_h5ad(real_data / f"{name}.h5ad", backed="r")
    right, wrong = (
        (MOUSE, HUMAN) if name in ("mouse_brain_merfish", "pancreas_baron_mouse") else (HUMAN, MOUSE)
    )
    match = match_genes(adata.var, right)
    total = np.asarray(adata.X[:].sum(axis=0)).ravel()
    share = total[match.gene_index >= 0].sum() / total.sum()
    print(f"{name}: {match.summary()}; {share:.1%} of the counts")
    assert match.column == column
    assert match.n_matched / len(match.gene_index) >= genes
    assert share >= counts

    other = match_genes(adata.var, wrong)
    assert total[other.gene_index >= 0].sum() / total.sum() < 0.05
    assert f"set data.gene_vocab: {right.name}" in likely_cause(other, wrong, adata.var)
    adata.file.close()


def test_ids_and_symbols_of_real_files_agree(real_data: Path) -> None:
    var = anndata.read_h5ad(real_data / "pbmc3k.h5ad", backed="r").var
    by_id, by_symbol = match_genes(var, HUMAN, "feature_id"), match_genes(var, HUMAN, "index")
    both = (by_id.gene_index >= 0) & (by_symbol.gene_index >= 0)
    assert both.sum() > 18_000
    assert (by_id.gene_index == by_symbol.gene_index)[both].mean() > 0.995


def test_markers_of_a_real_file_are_there(real_data: Path) -> None:
    var = anndata.read_h5ad(real_data / "pbmc3k.h5ad", backed="r").var
    found = set(matched(match_genes(var, HUMAN), HUMAN))
    assert {"CD3E", "MS4A1", "CCL5", "NKG7", "LYZ", "PPBP", "FCGR3A", "HLA-DRA"} <= found


def test_from_data_takes_every_gene_of_real_files(real_data: Path) -> None:
    frames = [
        anndata.read_h5ad(real_data / f"{n}.h5ad", backed="r").var
        for n in ("pbmc_kang_12k", "pbmc_sorted_zheng")
    ]
    vocab = resolve_vocab("from_data", frames)
    assert vocab.species == "human"
    for var in frames:
        assert match_genes(var, vocab).n_matched / len(var) > 0.995


def test_ids_of_the_vocabulary_are_matched_without_tables_as_with_them() -> None:
    vocab = predefined("human_protein_coding")
    ids = vocab.gene_ids[np.random.default_rng(0).permutation(vocab.n_genes)[:3000]]
    var = pd.DataFrame({"symbol": "x", MEASURED: np.arange(3000) % 5 > 0}, index=pd.Index(ids))
    fast, long = match_genes(var, vocab), identifiers._match(var, reference_of(vocab), None)
    np.testing.assert_array_equal(fast.gene_index, long.gene_index)
    pd.testing.assert_frame_equal(fast.table, long.table)
    assert (fast.column, fast.kind, fast.summary()) == (long.column, long.kind, long.summary())
    var.index = var.index.where(np.arange(3000) != 7, "ENSG00000000000")
    assert match_genes(var, vocab).table.reason[7] == "unknown Ensembl id"
