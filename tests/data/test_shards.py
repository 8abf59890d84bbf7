"""Shards: the same cells as before, whole or not at all, and what is broken is named."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scmodelforge.config import DataConfig
from scmodelforge.data import shards
from scmodelforge.data.check import check_data
from scmodelforge.data.matrix import LIBRARY_SIZE
from scmodelforge.data.shard_statistics import write_gene_statistics
from scmodelforge.data.shards import is_untouched_shard, verify_shards, write_shards
from scmodelforge.data.sources import open_matrix
from scmodelforge.data.statistics import gene_medians
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError, UserError
from scmodelforge.genes.vocab import read_medians, resolve_vocab
from scmodelforge.manifest import shard_paths
from scmodelforge.models.extension import new_genes
from tests.helpers import make_vocab, marker_cells
from tests.journeys.command import done, refused

VOCAB = make_vocab(30)  # ten of the cells' genes are outside
CONFIG = DataConfig()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files with different genes, in different ways."""
    one, two = marker_cells(50, seed=1), marker_cells(70, seed=2)[:, ::-1].copy()
    two.X = sparse.csc_matrix(two.X * 300)
    one.write_h5ad(tmp_path / "one.h5ad", compression="gzip")
    two.write_h5ad(tmp_path / "two.h5ad")
    return [tmp_path / "one.h5ad", tmp_path / "two.h5ad"]


def same_cells(files: list[Path], folder: Path) -> None:
    before, after = open_store(files, VOCAB, CONFIG), open_store(shard_paths(folder), VOCAB, CONFIG)
    assert before.n_cells == after.n_cells
    rows = np.random.default_rng(0).permutation(before.n_cells)
    one, two = before.read(rows), after.read(rows)
    for part in ("indptr", "gene_ids", "counts", "library_size"):
        np.testing.assert_array_equal(getattr(one, part), getattr(two, part))
        assert getattr(one, part).dtype == getattr(two, part).dtype
    assert list(before.obs.index) == list(after.obs.index)
    assert (before.obs["cell_type"].astype(str) == after.obs["cell_type"].astype(str)).all()


@pytest.mark.parametrize("processes", [1, 2])
def test_shards_hold_the_same_cells(files: list[Path], tmp_path: Path, processes: int) -> None:
    records = write_shards(files, VOCAB, CONFIG, tmp_path / "shards", cells_per_shard=20, processes=processes)
    assert [record.n_cells for record in records] == [20, 20, 10, 20, 20, 20, 10]
    same_cells(files, tmp_path / "shards")
    assert verify_shards(tmp_path / "shards") == []


def test_any_reader_of_anndata_opens_them_and_ours_maps_them(files: list[Path], tmp_path: Path) -> None:
    write_shards(files, VOCAB, CONFIG, tmp_path / "shards", obs_columns=["donor"])
    small, large = (ad.read_h5ad(path) for path in shard_paths(tmp_path / "shards"))
    assert (small.X.dtype, large.X.dtype) == (np.uint8, np.uint16)
    assert list(small.var_names) == list(VOCAB.gene_ids)
    assert list(small.obs.columns) == ["donor", LIBRARY_SIZE]
    assert "contiguous" in open_matrix(shard_paths(tmp_path / "shards")[0]).storage
    # the counts outside of the vocabulary are gone, and the library size is still that of all genes
    assert (small.obs[LIBRARY_SIZE] == np.asarray(marker_cells(50, seed=1).X.sum(axis=1)).ravel()).all()
    assert (small.X.sum(axis=1).ravel() < small.obs[LIBRARY_SIZE].to_numpy()).any()


def test_every_array_lies_in_one_piece_and_scipy_computes_with_it(files: list[Path], tmp_path: Path) -> None:
    write_shards(files, VOCAB, CONFIG, tmp_path / "shards")
    for path in shard_paths(tmp_path / "shards"):
        with h5py.File(path) as file:
            places = {name: file[name] for name in ("X/indptr", "X/indices", "X/data", f"obs/{LIBRARY_SIZE}")}
            kinds = [str(dataset.dtype) for dataset in places.values()]
            assert [kinds[0], kinds[1], kinds[3]] == ["int32", "int32", "float32"]
            for dataset in places.values():
                offset = dataset.id.get_offset()
                mapped = np.memmap(path, dataset.dtype, "r", offset, dataset.shape)
                np.testing.assert_array_equal(mapped, dataset[:])
        counts = ad.read_h5ad(path).X
        dense = counts.toarray()
        np.testing.assert_array_equal(
            counts.tocoo().toarray(), dense
        )  # refused with narrower or mixed index types
        counts.eliminate_zeros()
        np.testing.assert_array_equal(counts.multiply(2).toarray(), 2 * dense)
        backed = ad.read_h5ad(path, backed="r")
        np.testing.assert_array_equal(backed.X[5:9].toarray(), dense[5:9])


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(255, "uint8"), (256, "uint16"), (65_536, "uint32"), (2**24, "float32"), (1.5, "float32")],
)
def test_counts_are_stored_in_the_smallest_type_that_loses_nothing(
    tmp_path: Path, largest: float, dtype: str
) -> None:
    adata = marker_cells(3000)  # more than one block, and only the last one has the large count
    adata.X[-2, 0] = largest  # the sample that is looked at first does not have it
    adata.write_h5ad(tmp_path / "cells.h5ad")
    write_shards([tmp_path / "cells.h5ad"], VOCAB, CONFIG, tmp_path / "shards")
    (path,) = shard_paths(tmp_path / "shards")
    held = ad.read_h5ad(path)
    assert held.X.dtype == dtype
    np.testing.assert_array_equal(held.X.toarray(), adata[:, list(VOCAB.gene_ids)].X.toarray())


def test_all_kinds_of_obs_columns_survive(tmp_path: Path) -> None:
    adata = marker_cells(50)
    adata.obs["ordered"] = pd.Categorical(["b", "a"] * 25, categories=["b", "a", "never"], ordered=True)
    adata.obs["missing"] = pd.Categorical([None, "x"] * 25)
    adata.obs["flag"] = pd.array([True, None] * 25, dtype="boolean")
    adata.obs["number"] = pd.array([1, None] * 25, dtype="Int64")
    adata.obs["text"] = [f"t{i}" for i in range(50)]
    adata.obs.index.name = "barcode"
    adata.write_h5ad(tmp_path / "cells.h5ad", convert_strings_to_categoricals=False)
    write_shards([tmp_path / "cells.h5ad"], VOCAB, CONFIG, tmp_path / "shards", cells_per_shard=20)
    parts = [open_matrix(path).obs.drop(columns=LIBRARY_SIZE) for path in shard_paths(tmp_path / "shards")]
    whole = open_matrix(tmp_path / "cells.h5ad").obs
    text = {"text": str}  # distinct words are no categories before, and may be after
    pd.testing.assert_frame_equal(
        pd.concat(parts).astype(text), whole.astype(text), check_column_type=False, check_index_type=False
    )


def test_a_config_that_names_layer_and_gene_column_reads_the_shards_too(tmp_path: Path) -> None:
    adata = marker_cells(50)
    adata.layers["counts"], adata.X = adata.X, adata.X.multiply(0.5).tocsr()
    adata.var["my_id"] = adata.var_names
    adata.var_names = [f"v{i}" for i in range(40)]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    config = DataConfig(layer="counts", gene_column="my_id")
    write_shards([tmp_path / "cells.h5ad"], VOCAB, config, tmp_path / "shards")
    before = open_store([tmp_path / "cells.h5ad"], VOCAB, config)
    after = open_store(shard_paths(tmp_path / "shards"), VOCAB, config)
    rows = np.arange(50)
    np.testing.assert_array_equal(before.read(rows).counts, after.read(rows).counts)


def test_shards_say_which_genes_their_source_measured(tmp_path: Path) -> None:
    """Not only the file but the vocabulary, the report, the check and the new genes that are made of it."""
    vocab, panel = make_vocab(60), marker_cells(50)[:, 5:25].copy()
    panel.write_h5ad(tmp_path / "panel.h5ad")
    marker_cells(50).write_h5ad(tmp_path / "whole.h5ad")
    files = [tmp_path / "panel.h5ad", tmp_path / "whole.h5ad"]
    write_shards(files, vocab, CONFIG, tmp_path / "shards")
    before = open_store(files, vocab, CONFIG).read(np.arange(100)).measured
    path, _ = paths = shard_paths(tmp_path / "shards")
    store = open_store(paths, vocab, CONFIG)
    after = store.read(np.arange(100)).measured
    np.testing.assert_array_equal(after.sets[after.of_cell], before.sets[before.of_cell])
    assert after.sets.sum(axis=1).tolist() == [20, 40]

    adata = ad.read_h5ad(path)
    assert adata.var["scmodelforge_measured"].to_numpy().nonzero()[0].tolist() == list(range(5, 25))
    report = store.gene_report()
    assert (report.reason[report.file == str(path)] == "not measured").sum() == 40
    assert "matched 20 of 20 genes" in store.describe()[0]
    assert "40 genes have a column and were not measured" in store.describe()[0]
    lines = "\n".join(check_data(path, vocab, CONFIG).lines())
    assert "vocabulary genes measured: 20 of 60" in lines
    assert resolve_vocab("from_data", [adata.var]).n_genes == 20
    assert new_genes(make_vocab(24), [adata.var], None).gene_ids.tolist() == ["ENSG00000000024"]

    write_shards([path], vocab, CONFIG, tmp_path / "again")  # shards of shards
    assert open_store(shard_paths(tmp_path / "again"), vocab, CONFIG).measured_sets.sum() == 20
    adata.var["scmodelforge_measured"] = "yes"
    with pytest.raises(DataError, match="does not hold true and false alone"):
        open_store([adata], vocab, CONFIG)


def test_an_interrupted_conversion_goes_on(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, made = shards.write_shard, []

    def stops(target, *arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(target.name)
        return write(target, *arguments)

    folder = tmp_path / "shards"
    monkeypatch.setattr(shards, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        write_shards(files, VOCAB, CONFIG, folder, cells_per_shard=20)
    with pytest.raises(DataError, match="start it again"):
        verify_shards(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.h5ad")}
    assert len(before) == 3
    monkeypatch.setattr(shards, "write_shard", write)
    write_shards(files, VOCAB, CONFIG, folder, cells_per_shard=20)
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    same_cells(files, folder)
    assert not list(folder.glob(".*"))


def test_what_is_broken_is_named(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(files, VOCAB, CONFIG, folder, cells_per_shard=30)
    flipped, cut, gone, *_ = shard_paths(folder)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    problems = verify_shards(folder)
    assert [("was changed" in p, "cut off" in p, "missing" in p) for p in problems] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert all(path.name in problem for path, problem in zip((flipped, cut, gone), problems, strict=True))
    for path in (cut, gone):
        assert path.name in refused("shard", "--verify", folder, words=("start 'scmodelforge shard' again",))


def test_shards_of_another_vocabulary_are_not_mixed(files: list[Path], tmp_path: Path) -> None:
    write_shards(files, VOCAB, CONFIG, tmp_path / "shards")
    with pytest.raises(DataError, match="other gene vocabulary"):
        write_shards(files, make_vocab(20), CONFIG, tmp_path / "shards")
    with pytest.raises(DataError, match="other settings"):
        write_shards(files, VOCAB, CONFIG, tmp_path / "shards", cells_per_shard=7)


def test_a_changed_source_is_converted_again(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(files, VOCAB, CONFIG, folder, cells_per_shard=20)
    marker_cells(30, seed=3).write_h5ad(files[0])  # fewer than before: a shard is left over
    write_shards(files, VOCAB, CONFIG, folder, cells_per_shard=20)
    same_cells(files, folder)
    assert sorted(folder.glob("*.h5ad")) == sorted(shard_paths(folder))


def test_shards_of_other_files_are_neither_mixed_nor_lost(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(files[:1], VOCAB, CONFIG, folder)
    write_shards(files, VOCAB, CONFIG, folder)  # one more is welcome
    same_cells(files, folder)
    with pytest.raises(DataError, match=r"'one-00000.h5ad' is of a file that is not among those"):
        write_shards(files[1:], VOCAB, CONFIG, folder)
    (folder / "stranger.h5ad").write_bytes(b"")
    assert verify_shards(folder) == [
        f"'{folder / 'stranger.h5ad'}' is not in manifest.json: it is no shard of these."
    ]


def test_only_a_shard_that_nobody_wrote_to_is_trusted(files: list[Path], tmp_path: Path) -> None:
    write_shards(files, VOCAB, CONFIG, tmp_path / "shards")
    one, two = shard_paths(tmp_path / "shards")
    assert shards.is_untouched_shard(one)
    assert not shards.is_untouched_shard(files[0])
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    one.write_bytes(content)
    two.write_bytes(two.read_bytes() + b"x")
    assert not shards.is_untouched_shard(one)
    assert not shards.is_untouched_shard(two)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_file_is_named_and_the_others_are_converted(
    files: list[Path], tmp_path: Path, processes: int
) -> None:
    bad = tmp_path / "bad.h5ad"
    bad.write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="1 of 3 files failed") as error:
        write_shards([files[0], bad, files[1]], VOCAB, CONFIG, tmp_path / "shards", processes=processes)
    assert "bad.h5ad" in str(error.value)
    assert {path.name for path in (tmp_path / "shards").glob("*.h5ad")} == {
        "one-00000.h5ad",
        "two-00000.h5ad",
    }
    assert not (tmp_path / "shards/manifest.json").exists()


def test_the_command(files: list[Path], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{paths: [{files[0]}, {files[1]}], gene_vocab: from_data}}\n")
    out = done("shard", "--config", config, "--output", tmp_path / "shards").out
    assert "120 cells in 2 shards" in out
    assert "are whole" in done("shard", "--verify", tmp_path / "shards").out
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    assert manifest["n_cells"] == 120
    assert {record["source"] for record in manifest["shards"]} == {str(path) for path in files}
    refused("shard", "--config", config, words=("--output",))
    refused("shard", "--verify", tmp_path, words=("no manifest.json",))


def test_the_genes_of_shards_are_measured_once_beside_them(tmp_path: Path) -> None:
    cells, vocab = marker_cells(60), make_vocab(40)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    write_shards([tmp_path / "cells.h5ad"], vocab, DataConfig(), tmp_path / "shards", cells_per_shard=25)
    path = write_gene_statistics(tmp_path / "shards", vocab, DataConfig())
    store = open_store([tmp_path / "cells.h5ad"], vocab, DataConfig())
    medians, _ = gene_medians(store, np.arange(60), 10_000, "library_size")
    store.close()
    np.testing.assert_array_equal(read_medians(path, vocab), medians)
    written = path.stat().st_mtime_ns
    write_shards([tmp_path / "cells.h5ad"], vocab, DataConfig(), tmp_path / "shards", cells_per_shard=25)
    write_gene_statistics(tmp_path / "shards", vocab, DataConfig())
    assert path.stat().st_mtime_ns == written
    marker_cells(70).write_h5ad(tmp_path / "cells.h5ad")
    write_shards([tmp_path / "cells.h5ad"], vocab, DataConfig(), tmp_path / "shards", cells_per_shard=25)
    write_gene_statistics(tmp_path / "shards", vocab, DataConfig())
    assert path.stat().st_mtime_ns > written


def test_a_shard_in_memory_keeps_the_library_size_over_all_genes(tmp_path: Path) -> None:
    marker_cells(30).write_h5ad(tmp_path / "cells.h5ad")
    few = make_vocab(25)
    config = DataConfig(min_gene_overlap=0.0)
    write_shards([tmp_path / "cells.h5ad"], few, config, tmp_path / "shards")
    (path,) = shard_paths(tmp_path / "shards")
    rows = np.arange(30)
    on_disk, in_memory = (
        open_store([source], few, config).read(rows).library_size for source in (path, ad.read_h5ad(path))
    )
    assert (on_disk > ad.read_h5ad(path).X.sum(axis=1).A1).any()
    np.testing.assert_array_equal(on_disk, in_memory)


def test_a_deleted_shard_is_no_untouched_one(tmp_path: Path) -> None:
    marker_cells(30).write_h5ad(tmp_path / "cells.h5ad")
    write_shards([tmp_path / "cells.h5ad"], make_vocab(40), DataConfig(), tmp_path / "shards")
    (path,) = shard_paths(tmp_path / "shards")
    assert is_untouched_shard(path)
    path.unlink()
    assert not is_untouched_shard(path)


def test_the_genes_are_measured_again_for_values_of_another_kind(tmp_path: Path) -> None:
    marker_cells(30).write_h5ad(tmp_path / "cells.h5ad")
    vocab, config = make_vocab(40), DataConfig()
    write_shards([tmp_path / "cells.h5ad"], vocab, config, tmp_path / "shards")
    scaled = read_medians(write_gene_statistics(tmp_path / "shards", vocab, config), vocab)
    raw = config.model_copy(
        update={"preprocessing": config.preprocessing.model_copy(update={"normalize": "none"})}
    )
    counts = read_medians(write_gene_statistics(tmp_path / "shards", vocab, raw), vocab)
    assert not np.array_equal(scaled, counts)
    assert (counts == np.rint(2 * counts) / 2).all()
