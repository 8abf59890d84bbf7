"""Files of two species as one store: who is which, what is read, and that everything that opens files knows it."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scmodelforge.config import DataConfig
from scmodelforge.config_io import parse_config
from scmodelforge.data.check import check
from scmodelforge.data.shards import write_shards
from scmodelforge.data.species import named_species
from scmodelforge.data.store import CellStore, open_store
from scmodelforge.errors import ConfigError, DataError
from scmodelforge.genes.orthologs import orthologs
from scmodelforge.genes.tables import known_genes, load_table
from scmodelforge.genes.vocab import predefined, resolve_vocab
from scmodelforge.inference import embed, tokens
from scmodelforge.manifest import shard_paths
from scmodelforge.training.data import prepare_data
from scmodelforge.training.run import train
from tests.helpers import tiny_config
from tests.journeys.command import done, refused

HUMAN = predefined("human_protein_coding")
PAIRS = orthologs()[orthologs().human.isin(HUMAN.gene_ids)].iloc[:40]
ALONE = load_table("mouse").gene_id[~load_table("mouse").gene_id.isin(orthologs().mouse)].iloc[:10]
MOUSE = DataConfig(species="mouse")


def cells(species: str, n: int = 30, seed: int = 0) -> ad.AnnData:
    """Counts of 40 genes with a partner in the other species, and of ten without; mouse genes as symbols."""
    rng = np.random.default_rng(seed)
    ids = np.concatenate([PAIRS[species], ALONE if species == "mouse" else [f"own_{i}" for i in range(10)]])
    names = known_genes().symbol.loc[ids].to_numpy(object) if species == "mouse" else ids
    order = rng.permutation(50)
    counts = rng.poisson(1.0, (n, 50)).astype(np.float32)
    return ad.AnnData(
        sparse.csr_matrix(counts[:, order]),
        obs=pd.DataFrame({"organism": species}, index=[f"{species}{i}" for i in range(n)]),
        var=pd.DataFrame({"place": order}, index=names[order]),
    )


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = []
    for species in ("human", "mouse"):
        paths.append(str(tmp_path / f"{species}.h5ad"))
        cells(species).write_h5ad(paths[-1])
    return paths


def both(files: list[str]) -> DataConfig:
    return DataConfig(paths=files, species={"mouse.h5ad": "mouse"})


def dense(store: CellStore, genes: pd.Series) -> np.ndarray:
    """Counts of all cells of a store on the genes named."""
    batch = store.read(np.arange(store.n_cells))
    matrix = sparse.csr_matrix(
        (batch.counts, batch.gene_ids, batch.indptr), (store.n_cells, store.vocab.n_genes)
    )
    return matrix[:, pd.Index(store.vocab.gene_ids).get_indexer(pd.Index(genes))].toarray()


# --- which file is of which species ---------------------------------------------------------------


def test_files_are_named_by_path_name_or_pattern(files: list[str], tmp_path: Path) -> None:
    for name in (
        files[1],
        "mouse.h5ad",
        "mou*",
        str(tmp_path / "m*.h5ad"),
        str(tmp_path / "x" / ".." / "mouse.h5ad"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert named_species(files, DataConfig(species={name: "mouse"})) == [None, "mouse"]
    assert named_species(files, DataConfig(species="human")) == ["human", "human"]
    assert named_species(files, DataConfig()) == [None, None]
    assert named_species([cells("mouse")], MOUSE) == ["mouse"]
    # one file of several that the config is about
    assert named_species(files[:1], both(files)) == [None]


def test_a_name_that_fits_no_file_is_refused(files: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.species: 'muose\.h5ad' fits no file\. Files: .*human\.h5ad"
    ):
        open_store(files, HUMAN, DataConfig(species={"muose.h5ad": "mouse"}))


def test_a_file_of_two_species_is_refused(files: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"'mouse\.h5ad' says mouse and '\*\.h5ad' says human"):
        open_store(files, HUMAN, DataConfig(species={"mouse.h5ad": "mouse", "*.h5ad": "human"}))


@pytest.mark.parametrize("value", ["rat", {"a.h5ad": "rat"}, 3, ["mouse"], {"a.h5ad": None}])
def test_a_species_without_table_is_refused(value: object) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.species: must be human, mouse, or a mapping of files to these"
    ):
        parse_config({"data": {"species": value}})


# --- what is read ---------------------------------------------------------------------------------


def test_two_species_are_one_store(files: list[str]) -> None:
    store = open_store(files, HUMAN, both(files))
    want = np.concatenate([_in_order(cells(species)) for species in ("human", "mouse")])
    np.testing.assert_array_equal(dense(store, PAIRS.human), want[:, :40])
    batch = store.read(np.arange(60))
    assert batch.counts.sum() == want[:, :40].sum()
    np.testing.assert_array_equal(batch.library_size, want.sum(axis=1))  # of all genes, carried over or not
    report = store.gene_report()
    assert (report[report.file == files[1]].reason == "no one-to-one ortholog").sum() == 10
    assert "through one-to-one orthologs of mouse" in store.describe()[1]


def _in_order(adata: ad.AnnData) -> np.ndarray:
    out = np.empty(adata.shape)
    out[:, adata.var.place] = adata.X.toarray()
    return out


def test_without_it_the_message_names_both_remedies(files: list[str]) -> None:
    with pytest.raises(
        DataError, match=r"set data\.gene_vocab: mouse_protein_coding\. (.|\n)*set data\.species: mouse"
    ):
        open_store(files, HUMAN, DataConfig())
    done("check", files[1], "--set", "data.species=mouse")
    assert check(files[1], MOUSE).problems == []


def test_from_data_is_the_gene_space_of_most_files(files: list[str], tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", data={"paths": files, "species": {"mouse.h5ad": "mouse"}})
    prepared = prepare_data(config)
    assert prepared.vocab.species == "human"
    assert set(prepared.vocab.gene_ids) == {*PAIRS.human, *(f"own_{i}" for i in range(10))}
    table = tokens(files[1], model=None, config=parse_config({"data": {"species": "mouse"}}))
    assert len(table) > 10


def test_selected_genes_are_judged_by_the_genes_of_the_file(files: list[str]) -> None:
    few = HUMAN.subset(pd.Index(HUMAN.gene_ids).get_indexer(pd.Index(PAIRS.human[:3])))
    with pytest.raises(DataError, match="of its counts"):
        open_store(files[1:], few, MOUSE)
    assert open_store(files[1:], few, MOUSE, selected_genes=True).n_cells == 30


# --- shards ---------------------------------------------------------------------------------------


def test_shards_need_no_species_any_more(files: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    records = write_shards(files, HUMAN, both(files).model_copy(update={"paths": []}), folder)
    assert [record.settings["species"] for record in records] == [None, "mouse"]
    before = open_store(files, HUMAN, both(files))
    for config in (DataConfig(), MOUSE, DataConfig(species={"mouse-*": "mouse"})):  # or are told it again
        after = open_store(shard_paths(folder), HUMAN, config)
        np.testing.assert_array_equal(dense(before, PAIRS.human), dense(after, PAIRS.human))


def test_shards_of_a_mouse_vocabulary_are_mouse_cells(files: list[str], tmp_path: Path) -> None:
    write_shards(files[1:], predefined("mouse_protein_coding"), DataConfig(), tmp_path / "shards")
    store = open_store(shard_paths(tmp_path / "shards"), HUMAN, MOUSE)
    before = open_store(files[1:], HUMAN, MOUSE)
    np.testing.assert_array_equal(dense(store, PAIRS.human), dense(before, PAIRS.human))


def test_another_species_makes_another_shard(files: list[str], tmp_path: Path) -> None:
    vocab = resolve_vocab("from_data", [cells("human").var, cells("mouse").var])  # of both
    loose = DataConfig(min_gene_overlap=0.0)
    write_shards(files[:1], vocab, loose, tmp_path / "shards")
    made = {path: path.stat().st_mtime_ns for path in shard_paths(tmp_path / "shards")}
    records = write_shards(
        files[:1], vocab, loose.model_copy(update={"species": "human"}), tmp_path / "shards"
    )
    assert records[0].settings["species"] == "human"
    assert all(path.stat().st_mtime_ns != before for path, before in made.items())


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A model of the human cells above."""
    folder = tmp_path_factory.mktemp("human")
    config = tiny_config(folder, data={"gene_vocab": "human_protein_coding"}, training={"max_epochs": 1})
    return train(config, data=cells("human"))


def test_a_human_model_embeds_mouse_cells(trained, files: list[str], tmp_path: Path) -> None:
    model = trained.checkpoint_dir / "best.ckpt"
    carried = embed(cells("mouse"), model, config=MOUSE, copy=True).obsm["X_scmodelforge"]
    as_human = cells("mouse")
    partner = dict(zip(known_genes().symbol[PAIRS.mouse], PAIRS.human, strict=True))
    as_human.var_names = [partner.get(name, name) for name in as_human.var_names]
    np.testing.assert_allclose(carried, embed(as_human, model).obsm["X_scmodelforge"], atol=1e-5)

    out = tmp_path / "out.h5ad"
    arguments = ("embed", "--data", files[1], "--model", model, "--output", out)
    done(*arguments, "--set", "data.species=mouse")
    np.testing.assert_allclose(ad.read_h5ad(out).obsm["X_scmodelforge"], carried, atol=1e-5)
    refused(*arguments, words=("data.species: mouse",))


def test_a_model_grows_by_orthologs(files: list[str], tmp_path: Path) -> None:
    first = train(
        tiny_config(tmp_path / "first", training={"max_epochs": 1}), data=cells("human")[:, :20].copy()
    )
    config = tiny_config(
        tmp_path / "second",
        data={"paths": files[1:], "species": "mouse", "extend_vocab": "mean", "min_gene_overlap": 0.0},
        training={"max_epochs": 1},
    )
    second = train(config, checkpoint=first.checkpoint_dir / "best.ckpt")
    from scmodelforge.models.bundle import load_model

    vocab = load_model(second.checkpoint_dir / "best.ckpt").vocab
    assert set(PAIRS.human) <= set(vocab.gene_ids)
    assert not pd.Series(vocab.gene_ids).str.startswith("ENSMUSG").any()


# --- real cells -----------------------------------------------------------------------------------

MARKERS = {  # of the pancreas, the same in both species (Baron et al. 2016, figure 1)
    "beta": "IAPP",
    "alpha": "GCG",
    "delta": "SST",
    "gamma": "PPY",
    "ductal": "KRT19",
    "endothelial": "PLVAP",
    "macrophage": "TYROBP",
    "quiescent_stellate": "RGS5",
}


def test_human_and_mouse_pancreas_meet(real_data: Path, tmp_path: Path) -> None:
    paths = [str(real_data / f"pancreas_baron_{species}.h5ad") for species in ("human", "mouse")]
    data = {
        "paths": paths,
        "species": {"pancreas_baron_mouse*": "mouse"},
        "gene_vocab": "human_protein_coding",
    }
    store = prepare_data(tiny_config(tmp_path / "none", data=data)).store
    batch = store.read(np.arange(store.n_cells))
    values = np.log1p(1e4 * batch.counts / np.repeat(batch.library_size, batch.n_genes_per_cell))
    matrix = sparse.csr_matrix((values, batch.gene_ids, batch.indptr), (store.n_cells, HUMAN.n_genes))
    of_file = np.repeat([0, 1], np.diff(store.offsets))
    cell_types = store.obs["cell_type"].astype(str).to_numpy()
    means = [
        {
            name: np.asarray(matrix[(of_file == file) & (cell_types == name)].mean(axis=0)).ravel()
            for name in MARKERS
        }
        for file in (0, 1)
    ]
    # each marker is highest in its own type, in both species
    for name, symbol in MARKERS.items():
        gene = int(np.flatnonzero(HUMAN.symbols == symbol)[0])
        for of_species in means:
            assert max(of_species, key=lambda other: of_species[other][gene]) == name, symbol
    # and each mouse type is most like its human namesake, after what all types have in common
    human, mouse = ({n: p - np.mean(list(m.values()), axis=0) for n, p in m.items()} for m in means)
    for name, profile in mouse.items():
        assert max(human, key=lambda other: np.corrcoef(profile, human[other])[0, 1]) == name


def test_a_model_trains_on_both(real_data: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{species}.h5ad") for species in ("human", "mouse")]
    for path in paths:
        ad.read_h5ad(real_data / f"pancreas_baron_{Path(path).name}")[:100].write_h5ad(path)
    data = {"paths": paths, "species": {"mouse.h5ad": "mouse"}, "gene_vocab": "human_protein_coding"}
    result = train(tiny_config(tmp_path / "run", data=data, training={"max_epochs": 1}))
    embedded = embed(ad.read_h5ad(paths[1]), result.checkpoint_dir / "best.ckpt", config=MOUSE)
    assert np.isfinite(embedded.obsm["X_scmodelforge"]).all()
