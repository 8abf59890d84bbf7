"""The vocabulary: what it holds, that it survives every way of saving, and what it says to bad tables."""

from __future__ import annotations

import json
import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.errors import ConfigError, DataError, ModelError
from scmodelforge.genes.tables import load_table
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, GeneVocab, predefined, read_medians, resolve_vocab


def small(n: int = 5, **changes: object) -> GeneVocab:
    human = predefined("human_protein_coding").subset(np.arange(n))
    return GeneVocab(**{**{f: getattr(human, f) for f in GeneVocab.__dataclass_fields__}, **changes})  # type: ignore[arg-type]


def same(one: GeneVocab, other: GeneVocab) -> bool:
    return one.fingerprint == other.fingerprint and all(
        np.array_equal(getattr(one, f), getattr(other, f))
        for f in ("gene_ids", "symbols", "biotypes", "species", "special_tokens", "name")
    )


# --- tables and predefined vocabularies -----------------------------------------------------------


@pytest.mark.parametrize(
    ("species", "gene_id", "symbol", "biotype"),
    [
        ("human", "ENSG00000198851", "CD3E", "protein_coding"),
        ("human", "ENSG00000251562", "MALAT1", "lncRNA"),
        ("human", "ENSG00000198888", "MT-ND1", "protein_coding"),
        ("mouse", "ENSMUSG00000032093", "Cd3e", "protein_coding"),
        ("mouse", "ENSMUSG00000035000", "Dpp4", "protein_coding"),
    ],
)
def test_tables_hold_known_genes(species: str, gene_id: str, symbol: str, biotype: str) -> None:
    gene = load_table(species).set_index("gene_id").loc[gene_id]
    assert (gene.symbol, gene.biotype) == (symbol, biotype)


def test_tables_hold_earlier_human_symbols() -> None:
    human = load_table("human").set_index("symbol").previous
    assert human["SEPTIN1"] == "DIFF6|SEPT1"
    assert "MARCH1" in human["MARCHF1"].split("|")


@pytest.mark.parametrize(("name", "n"), [("human_protein_coding", 20_120), ("mouse_protein_coding", 21_807)])
def test_predefined_are_the_coding_genes_in_order(name: str, n: int) -> None:
    vocab = predefined(name)
    assert vocab.n_genes == n
    assert vocab.name == name
    assert vocab.species == name.split("_")[0]
    assert set(vocab.biotypes) == {"protein_coding"}
    assert list(vocab.gene_ids) == sorted(set(vocab.gene_ids))


# --- tokens ---------------------------------------------------------------------------------------


def test_special_tokens_come_first_in_both_layouts() -> None:
    v2 = small()
    assert (v2.pad_id, v2.mask_id, v2.cls_id, v2.eos_id, v2.first_gene_token, v2.n_tokens) == (
        0,
        1,
        2,
        3,
        4,
        9,
    )
    v1 = v2.with_special_tokens(VOCAB_LAYOUTS["geneformer_v1"])
    assert (v1.pad_id, v1.mask_id, v1.cls_id, v1.eos_id, v1.first_gene_token, v1.n_tokens) == (
        0,
        1,
        None,
        None,
        2,
        7,
    )


def test_tokens_read_as_names() -> None:
    vocab = small(2, symbols=np.array(["TSPAN6", ""], dtype=object))
    assert vocab.tokens_to_names([2, 4, 5, 0]) == ["<cls>", "TSPAN6", "ENSG00000000005", "<pad>"]


def test_rows_of_genes() -> None:
    vocab = small()
    assert [vocab.index_of()[gene] for gene in vocab.gene_ids] == [0, 1, 2, 3, 4]


def test_subset_keeps_what_belongs_to_a_gene() -> None:
    vocab = small().with_medians(np.arange(1.0, 6.0)).subset(np.array([3, 1]))
    assert vocab.medians is not None
    assert vocab.medians.tolist() == [4, 2]
    assert vocab.symbols.tolist() == small().symbols[[3, 1]].tolist()


# --- identity -------------------------------------------------------------------------------------


def test_fingerprint_follows_content_and_not_the_name() -> None:
    vocab = small()
    assert small(name="other").fingerprint == vocab.fingerprint
    medians = np.array([1.0, 2, 3, 4, np.nan])
    different = [
        vocab,
        vocab.subset(np.arange(4)),
        vocab.subset(np.array([1, 0, 2, 3, 4])),
        vocab.with_special_tokens(VOCAB_LAYOUTS["geneformer_v1"]),
        vocab.with_medians(medians),
        vocab.with_medians(medians + 1e-12),
    ]
    assert len({v.fingerprint for v in different}) == len(different)


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Z"]), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_vocabulary_survives_saving(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    ids = data.draw(st.lists(names, min_size=1, max_size=8, unique=True))
    median = st.one_of(st.just(np.nan), st.floats(1e-6, 1e6))
    medians = data.draw(st.none() | st.lists(median, min_size=len(ids), max_size=len(ids)))
    vocab = GeneVocab(
        gene_ids=np.array(ids, dtype=object),
        symbols=np.array(
            data.draw(st.lists(names | st.just(""), min_size=len(ids), max_size=len(ids))), dtype=object
        ),
        biotypes=np.array(["protein_coding"] * len(ids), dtype=object),
        medians=None if medians is None else np.array(medians),
        special_tokens=data.draw(st.sampled_from(list(VOCAB_LAYOUTS.values()))),
        name=data.draw(names),
    )
    path = tmp_path_factory.mktemp("vocab") / "genes.parquet"
    vocab.save(path)
    assert same(GeneVocab.load(path), vocab)
    plain = json.loads(json.dumps(vocab.to_plain()))
    assert same(GeneVocab.from_plain(plain), vocab)


def test_saved_vocabulary_is_an_ordinary_table(tmp_path) -> None:
    small().with_medians(np.arange(1.0, 6.0)).save(tmp_path / "genes.parquet")
    frame = pd.read_parquet(tmp_path / "genes.parquet")
    assert list(frame) == ["gene_id", "symbol", "biotype", "median"]


def test_damage_is_noticed(tmp_path) -> None:
    path = tmp_path / "genes.parquet"
    small().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"genes\.parquet' cannot be read"):
        GeneVocab.load(path)
    plain = small().to_plain()
    with pytest.raises(ModelError, match="lacks medians"):
        GeneVocab.from_plain({k: v for k, v in plain.items() if k != "medians"})
    with pytest.raises(ModelError, match="does not have the fingerprint"):
        GeneVocab.from_plain({**plain, "gene_ids": plain["gene_ids"][::-1]})


# --- tables of one's own --------------------------------------------------------------------------


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_of_ids_is_enough(tmp_path) -> None:
    path = write(tmp_path / "mine.tsv", "gene_id\nENSG00000198851.17\nENSG00000000003\n")
    vocab = GeneVocab.load(path)
    assert vocab.gene_ids.tolist() == ["ENSG00000198851", "ENSG00000000003"]
    assert vocab.symbols.tolist() == ["CD3E", "TSPAN6"]
    assert (vocab.species, vocab.name, vocab.medians) == ("human", "mine", None)


def test_a_gene_may_be_called_na(tmp_path) -> None:
    path = write(tmp_path / "mine.csv", "gene_id,symbol,median\nNA,NA,2.5\nb,nan,\n")
    vocab = GeneVocab.load(path)
    assert vocab.gene_ids.tolist() == ["NA", "b"]
    assert vocab.symbols.tolist() == ["NA", "nan"]
    np.testing.assert_array_equal(vocab.medians, [2.5, np.nan])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("v.tsv", "id\nENSG00000198851\n", "no column 'gene_id'; it has: id"),
        ("v.tsv", "gene_id\n", "holds no genes"),
        ("v.tsv", "", "cannot be read"),
        ("v.tsv", "gene_id\tsymbol\na\tx\n\ty\n", "no gene_id in row 2 of 2"),
        ("v.csv", "gene_id\na\nb\na\n", r"lists 1 gene ids more than once \(a\)"),
        ("v.csv", "gene_id\nENSG00000198851.1\nENSG00000198851.2\n", "more than once"),
        ("v.csv", "gene_id,median\na,-1\n", r"1 medians that are not positive and finite \(first: -1 of a\)"),
        ("v.csv", "gene_id,median\na,much\n", "first: much of a"),
        ("v.json", "{}", "must be a .parquet, .csv or .tsv file"),
        ("v.parquet", "no parquet", "cannot be read"),
    ],
)
def test_bad_tables_are_named(tmp_path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as error:
        GeneVocab.load(path)
    assert name.split(".")[0] in str(error.value)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"There is no gene vocabulary at '.*gone\.tsv'"):
        GeneVocab.load(tmp_path / "gone.tsv")


# --- what data.gene_vocab may say -----------------------------------------------------------------


def test_names_and_paths(tmp_path) -> None:
    assert resolve_vocab("mouse_protein_coding") is predefined("mouse_protein_coding")
    small().save(tmp_path / "genes.parquet")
    assert same(resolve_vocab(str(tmp_path / "genes.parquet")), small())


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'human', which(.|\n)*mouse_protein_coding, from_data"):
        resolve_vocab("human")


def test_from_data_is_the_union_in_canonical_ids() -> None:
    symbols = pd.DataFrame(index=["CD3E", "MALAT1", "SEPT1", "my_transgene"])
    ids = pd.DataFrame({"feature_name": ["CD3E", "MS4A1"]}, index=["ENSG00000198851.12", "ENSG00000156738.1"])
    vocab = resolve_vocab("from_data", [symbols, ids])
    assert dict(zip(vocab.gene_ids, vocab.symbols, strict=True)) == {
        "ENSG00000156738": "MS4A1",
        "ENSG00000180096": "SEPTIN1",
        "ENSG00000198851": "CD3E",
        "ENSG00000251562": "MALAT1",
        "my_transgene": "my_transgene",
    }
    assert vocab.species == "human"
    assert list(vocab.gene_ids) == sorted(vocab.gene_ids)
    assert resolve_vocab("from_data", [ids, symbols]).fingerprint == vocab.fingerprint


def test_from_data_keeps_names_that_nobody_knows() -> None:
    vocab = resolve_vocab("from_data", [pd.DataFrame(index=["ENSRNOG00000000001.4", "probe_7"])])
    assert vocab.gene_ids.tolist() == ["ENSRNOG00000000001", "probe_7"]
    assert vocab.species == "unknown"


def test_from_data_of_two_species() -> None:
    frames = [pd.DataFrame(index=["CD3E", "MS4A1"]), pd.DataFrame(index=["Cd3e", "Ms4a1"])]
    vocab = resolve_vocab("from_data", frames)
    assert sorted(vocab.symbols) == ["CD3E", "Cd3e", "MS4A1", "Ms4a1"]
    assert vocab.species == "unknown"


def test_from_data_needs_data() -> None:
    with pytest.raises(ConfigError, match=r"data\.paths is empty"):
        resolve_vocab("from_data")


# --- medians --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_medians_follow_the_vocabulary(tmp_path, ending: str, caplog: pytest.LogCaptureFixture) -> None:
    vocab, path = small(3), tmp_path / f"medians.{ending}"
    frame = pd.DataFrame(
        {"gene_id": [vocab.gene_ids[2], "ENSG99999999999", f"{vocab.gene_ids[0]}.5"], "median": [3, 2, 0.5]}
    )
    if ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(read_medians(path, vocab), [0.5, np.nan, 3])
    assert "no median for 1 of 3 vocabulary genes" in caplog.text
    assert "1 genes are not in the vocabulary 'human_protein_coding'" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene_id\nENSG00000000003\n", "no column 'median'"),
        ("gene_id,median\nENSG00000000003,0\n", "not positive and finite"),
        ("gene_id,median\nENSG00000000003,inf\n", "not positive and finite"),
        ("gene_id,median\nENSG00000000003,1\nENSG00000000003,2\n", "more than once"),
        (
            "gene_id,median\nENSMUSG00000000001,1\n",
            r"None of the 1 genes .* is in the vocabulary(.|\n)*data\.gene_vocab",
        ),
    ],
)
def test_bad_medians_are_named(tmp_path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_medians(write(tmp_path / "medians.csv", text), small())
