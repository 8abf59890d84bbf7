"""Two species in one gene space: the table, genes that are carried over, and what is said of those that are not."""

from __future__ import annotations

import logging
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.genes.identifiers import likely_cause, match_genes
from scmodelforge.genes.orthologs import orthologs, orthologs_of
from scmodelforge.genes.tables import SPECIES, known_genes, load_table
from scmodelforge.genes.vocab import predefined, resolve_vocab
from tests.genes.test_identifiers import frame, matched

HUMAN = predefined("human_protein_coding")
MOUSE = predefined("mouse_protein_coding")
PAIRS = orthologs()


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("species", SPECIES)
def test_pairs_are_one_to_one_and_of_known_genes(species: str) -> None:
    assert PAIRS[species].is_unique
    assert PAIRS[species].isin(load_table(species).gene_id).all()


def test_pairs_that_everybody_knows() -> None:
    symbol = known_genes().symbol
    pairs = dict(zip(symbol[PAIRS.mouse], symbol[PAIRS.human], strict=True))
    # with another name in the other species, where capitals alone would mislead
    for mouse, human in {
        "Trp53": "TP53",
        "Fcer2a": "FCER2",
        "Zfp469": "ZNF469",
        "Cd3e": "CD3E",
        "Gcg": "GCG",
    }.items():
        assert pairs[mouse] == human
    assert not {"Ins1", "Ins2"} & set(pairs)  # both are insulin


@given(st.lists(st.integers(0, len(PAIRS) - 1)), st.sampled_from(SPECIES))
def test_there_and_back_again(rows: list[int], species: str) -> None:
    other = "mouse" if species == "human" else "human"
    ids = PAIRS[species].to_numpy(object)[rows]
    assert orthologs_of(orthologs_of(ids, species), other).tolist() == ids.tolist()
    assert orthologs_of(np.array(["", "probe", *ids], dtype=object), species)[:2].tolist() == ["", ""]


# --- matching -------------------------------------------------------------------------------------


def test_each_gene_is_told_what_became_of_it() -> None:
    names = [
        "Cd3e",
        "ENSMUSG00000031297.8",
        "X0610009L18Rik",
        "H2.K1",
        "Ins1",
        "Ighg3",
        "CD3E",
        "probe_7",
        "",
    ]
    match = match_genes(frame(*names), HUMAN, species="mouse")
    assert matched(match, HUMAN) == ["CD3E", "SLC7A3", "", "", "", "", "", "", ""]
    assert match.table.reason.tolist()[:2] == ["symbol", "Ensembl id"]
    assert match.table.symbol.tolist()[:2] == ["Cd3e", "Slc7a3"]
    assert match.table.ortholog.tolist()[:2] == ["ENSG00000198851", "ENSG00000165349"]
    assert match.table.reason.tolist()[2:5] == ["no one-to-one ortholog"] * 3
    assert match.table.reason.tolist()[6:] == ["unknown name", "unknown name", "no name"]
    assert match.species == "mouse"


def test_an_ortholog_outside_of_the_vocabulary_is_told_apart() -> None:
    vocab = HUMAN.subset(np.flatnonzero(HUMAN.symbols != "CD3E"))
    match = match_genes(frame("Cd3e", "Ins1"), vocab, species="mouse")
    assert match.table.reason.tolist() == ["not in the vocabulary: protein_coding", "no one-to-one ortholog"]
    assert match.table.ortholog.tolist() == ["ENSG00000198851", ""]


def test_the_summary_says_that_genes_were_carried_over() -> None:
    var = frame("Cd3e", "Trp53", "Ins1", "Ins2", "nobody")
    assert match_genes(var, HUMAN, species="mouse").summary() == (
        "matched 2 of 5 genes by symbol in var_names through one-to-one orthologs of mouse; 3 not: 2 no one-to-one "
        "ortholog, 1 unknown name"
    )


@given(st.lists(st.integers(0, len(PAIRS) - 1), min_size=1, unique=True), st.sampled_from(["id", "symbol"]))
@settings(deadline=None)
def test_a_gene_meets_the_vocabulary_where_its_ortholog_does(rows: list[int], by: str) -> None:
    ids = PAIRS.mouse.to_numpy(object)[rows]
    names = ids if by == "id" else known_genes().symbol.loc[ids].to_numpy(object)
    match = match_genes(frame(*names), HUMAN, species="mouse")
    found = match.table.gene_id.to_numpy() == ids  # a symbol may be another gene's too
    assert found.all() if by == "id" else found.mean() > 0.5
    wanted = pd.Index(HUMAN.gene_ids).get_indexer(pd.Index(PAIRS.human.to_numpy(object)[rows]))
    np.testing.assert_array_equal(match.gene_index[found], wanted[found])


def test_the_species_of_the_vocabulary_changes_nothing() -> None:
    var = frame("CD3E", "SEPT1", "MALAT1", "nobody")
    pd.testing.assert_frame_equal(
        match_genes(var, HUMAN, species="human").table, match_genes(var, HUMAN).table
    )


def test_a_vocabulary_of_both_species_has_the_gene_itself() -> None:
    both = resolve_vocab("from_data", [frame("CD3E", "TP53"), frame("Cd3e")])
    match = match_genes(frame("Cd3e", "Trp53"), both, species="mouse")
    assert matched(match, both) == ["Cd3e", "TP53"]
    assert match.table.ortholog.tolist() == ["", "ENSG00000141510"]


def test_the_wrong_species_is_named() -> None:
    var = frame("CD3E", "MS4A1", "NKG7")
    text = likely_cause(match_genes(var, HUMAN, species="mouse"), HUMAN, var)
    assert (
        text
        == "3 of 3 genes are known human genes (by symbols in var_names); data.species says mouse: correct it."
    )


def test_both_remedies_for_another_species_are_named() -> None:
    var = frame("Cd3e", "Ms4a1", "Nkg7")
    text = likely_cause(match_genes(var, HUMAN), HUMAN, var)
    assert "data.gene_vocab: mouse_protein_coding" in text
    assert "data.species: mouse" in text


# --- vocabularies from data -----------------------------------------------------------------------

ONE, TWO = frame("CD3E", "MS4A1", "my_transgene"), frame("Cd3e", "Trp53", "Ins1", "probe")


@pytest.mark.parametrize("species", [["human", "mouse"], [None, "mouse"]])
def test_from_data_of_two_species_is_one_gene_space(species: list, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        vocab = resolve_vocab("from_data", [ONE, TWO], species=species)
    assert sorted(vocab.symbols) == ["CD3E", "MS4A1", "TP53", "my_transgene"]
    assert vocab.species == "human"
    assert "2 genes of files of another species than human have no one-to-one ortholog" in caplog.text


def test_most_files_decide_the_species() -> None:
    vocab = resolve_vocab("from_data", [ONE, TWO, TWO], species=["human", "mouse", "mouse"])
    assert vocab.species == "mouse"
    assert {"Cd3e", "Ms4a1", "Trp53", "Ins1", "probe"} == set(vocab.symbols)


def test_two_species_that_share_no_gene_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_vocab("from_data", [ONE, TWO]).species == "unknown"
    assert "data.species" in caplog.text


# --- real files -----------------------------------------------------------------------------------


def test_mouse_names_as_r_mangles_them(real_data: Path) -> None:
    adata = anndata.read_h5ad(real_data / "pancreas_baron_mouse.h5ad")
    counts = np.asarray(adata.X.sum(axis=0)).ravel()
    insulin = adata.var_names.isin(["Ins1", "Ins2"])
    for column, genes in ((None, 0.80), ("index", 0.78)):
        match = match_genes(adata.var, HUMAN, column, "mouse")
        hit = match.gene_index >= 0
        assert hit.mean() > genes
        assert counts[hit].sum() / counts[~insulin].sum() > 0.83
        assert not hit[insulin].any()


def test_our_pairs_are_those_of_the_authors_of_a_file(real_data: Path) -> None:
    """The mouse cells of the orthologs file bear human symbols; the same cells are in the mouse file."""
    theirs = anndata.read_h5ad(real_data / "pancreas_baron_orthologs.h5ad")
    mouse = anndata.read_h5ad(real_data / "pancreas_baron_mouse.h5ad")
    cells = theirs.obs_names.intersection(mouse.obs_names)
    by_them = pd.Series(match_genes(theirs.var, HUMAN).gene_index, theirs.var_names)
    by_us = match_genes(mouse.var, HUMAN, species="mouse").gene_index
    theirs, mouse = theirs[cells].X.toarray(), mouse[cells].X.toarray()
    place = {gene: column for column, gene in enumerate(by_us) if gene >= 0}
    both = [
        (column, place[gene])
        for column, gene in enumerate(by_them)
        if gene in place and theirs[:, column].any()
    ]
    equal = [(theirs[:, a] == mouse[:, b]).all() for a, b in both]
    assert len(cells) > 10
    assert len(both) > 2_000
    assert np.mean(equal) > 0.97
