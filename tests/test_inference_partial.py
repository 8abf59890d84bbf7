"""A stopped embedding goes on where it was, gives what one run gives, and uses nothing that is of something else."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scmodelforge import inference_files, inference_partial
from scmodelforge.errors import DataError
from scmodelforge.inference_files import annotate_file, embed_file
from scmodelforge.models.bundle import ModelBundle, load_model, save_bundle
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import marker_cells, untrained_annotator

KEY = "X_scmodelforge"
BATCH = 8


@pytest.fixture(autouse=True)
def every_batch_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_partial, "SECONDS", 0.0)


@pytest.fixture
def bundle() -> ModelBundle:
    return untrained_annotator()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    marker_cells(50, seed=7).write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def stopped(
    bundle: ModelBundle, source: Path, output: Path, use: Callable[..., Any] = embed_file
) -> list[int]:
    """Run until Ctrl-C comes in the fourth batch."""
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        counted(bundle, seen, source, output, use, stop=4)
    return seen


def counted(
    bundle: ModelBundle,
    seen: list[int],
    source: Path,
    output: Path,
    use: Callable[..., Any] = embed_file,
    stop: int = -1,
    **how: Any,
) -> Any:
    """Run, and note the rows of the cells that the model encodes."""
    encode = bundle.model.encode
    batches = 0

    def counting(tokens: TokenBatch, pooling: str | None = None) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if batches == stop:
            raise KeyboardInterrupt
        seen.extend(tokens.cell_index.tolist())
        return encode(tokens, pooling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle.model, "encode", counting)
        return use(source, output, bundle, batch_size=BATCH, **how)


def embedding(path: Path) -> np.ndarray:
    return ad.read_h5ad(path).obsm[KEY]


def test_a_stopped_embedding_goes_on_and_is_what_one_run_gives(
    bundle: ModelBundle, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embed_file(source, tmp_path / "once.h5ad", bundle, batch_size=BATCH)
    output = tmp_path / "out.h5ad"
    with caplog.at_level(logging.INFO, "scmodelforge"):
        stopped(bundle, source, output)
        assert f"What is done is kept in '{output}.partial'; start again to go on." in caplog.messages
        assert not output.exists()
        seen: list[int] = []
        assert counted(bundle, seen, source, output) == 50
    assert f"Going on after 16 of 50 cells, which '{output}.partial' holds." in caplog.messages
    assert seen == list(range(16, 50))
    np.testing.assert_array_equal(embedding(output), embedding(tmp_path / "once.h5ad"))
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "once.h5ad", "out.h5ad"}


def test_in_place_and_stopped_while_the_file_is_copied(
    monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle, source: Path, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = source.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference_files.shutil, "copyfile", fail)
        with pytest.raises(DataError, match=r"cannot be copied to .*No space left on device"):
            embed_file(source, source, bundle, batch_size=BATCH)
    assert source.read_bytes() == before
    seen: list[int] = []
    counted(bundle, seen, source, source)
    assert not seen, "all cells were done"
    assert embedding(source).shape == (50, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def test_a_stopped_annotation_goes_on(bundle: ModelBundle, source: Path, tmp_path: Path) -> None:
    once = annotate_file(source, tmp_path / "once.h5ad", bundle, batch_size=BATCH)
    stopped(bundle, source, tmp_path / "out.h5ad", annotate_file)
    seen: list[int] = []
    found = counted(bundle, seen, source, tmp_path / "out.h5ad", annotate_file)
    assert seen == list(range(16, 50))
    pd.testing.assert_frame_equal(found, once)


def test_a_short_run_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle, source: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(inference_partial, "SECONDS", 3600.0)
    stopped(bundle, source, tmp_path / "out.h5ad")
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def another_model(bundle: ModelBundle, source: Path, folder: Path) -> dict[str, Any]:
    with torch.no_grad():
        next(bundle.model.parameters()).add_(0.1)
    return {}


def another_file(bundle: ModelBundle, source: Path, folder: Path) -> dict[str, Any]:
    marker_cells(50, seed=8).write_h5ad(source)
    return {}


def another_pooling(bundle: ModelBundle, source: Path, folder: Path) -> dict[str, Any]:
    return {"pooling": "cls"}


def unreadable_record(bundle: ModelBundle, source: Path, folder: Path) -> dict[str, Any]:
    (folder / "record.json").write_text('{"rows": 16')
    return {}


def rows_cut_off(bundle: ModelBundle, source: Path, folder: Path) -> dict[str, Any]:
    os.truncate(folder / "rows.f32", 100)
    return {}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (another_model, "is of another model"),
        (another_file, "is of another source"),
        (another_pooling, "is of another pooling"),
        (unreadable_record, "is damaged"),
        (rows_cut_off, "is damaged"),
    ],
)
def test_rows_of_anything_else_are_not_used(
    bundle: ModelBundle,
    source: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[..., dict[str, Any]],
    why: str,
) -> None:
    output = tmp_path / "out.h5ad"
    stopped(bundle, source, output)
    how = change(bundle, source, tmp_path / "out.h5ad.partial")
    seen: list[int] = []
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        counted(bundle, seen, source, output, **how)
    assert f"'{output}.partial' {why}, so all cells are computed anew." in caplog.messages
    assert seen == list(range(50))
    embed_file(source, tmp_path / "once.h5ad", bundle, batch_size=BATCH, **how)
    np.testing.assert_array_equal(embedding(output), embedding(tmp_path / "once.h5ad"))


def test_empty_cells_of_the_stopped_run_are_counted_too(
    bundle: ModelBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells = marker_cells(50, seed=7)
    matrix = cells.X.tolil()
    matrix[[3, 40]] = 0
    cells.X = matrix.tocsr()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    stopped(bundle, tmp_path / "cells.h5ad", tmp_path / "out.h5ad")
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        embed_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", bundle, batch_size=BATCH)
    assert "2 cells have no gene that the model knows: their embedding says nothing." in caplog.messages


KILLED = f"""
import os, signal, sys
from scmodelforge import inference_partial
from scmodelforge.inference_files import embed_file
from scmodelforge.models.bundle import load_model
inference_partial.SECONDS = 0.0
bundle = load_model(sys.argv[1])
encode, batches = bundle.model.encode, []
def killing(tokens, pooling):
    batches.append(1)
    if len(batches) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(tokens, pooling)
bundle.model.encode = killing
embed_file(sys.argv[2], sys.argv[3], bundle, batch_size={BATCH})
"""


def test_killed_it_goes_on_and_leaves_nothing_half_written(
    bundle: ModelBundle, source: Path, tmp_path: Path
) -> None:
    save_bundle(bundle, tmp_path / "model")
    output = tmp_path / "out.h5ad"
    process = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "model", source, output], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    assert json.loads((tmp_path / "out.h5ad.partial" / "record.json").read_text())["rows"] == 24
    with open(tmp_path / "out.h5ad.partial" / "rows.f32", "ab") as file:
        file.write(b"half a row")
    (tmp_path / ".out.h5ad.77.tmp").touch()  # as a kill while the file is copied leaves it
    seen: list[int] = []
    counted(load_model(tmp_path / "model"), seen, source, output)
    assert seen == list(range(24, 50))
    embed_file(source, tmp_path / "once.h5ad", bundle, batch_size=BATCH)
    np.testing.assert_array_equal(embedding(output), embedding(tmp_path / "once.h5ad"))
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "model", "once.h5ad", "out.h5ad"}


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_the_embedding_of_all_cells_is_never_in_memory(
    monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle, tmp_path: Path
) -> None:
    width, held = 65_536, []
    marker_cells(600).write_h5ad(tmp_path / "cells.h5ad")
    write = inference_files.write_elem

    def encode(tokens: TokenBatch, pooling: str | None) -> torch.Tensor:
        held.append(anonymous_bytes())
        return tokens.cell_index[:, None].float().repeat(1, width)

    def writing(*arguments: Any) -> None:
        write(*arguments)
        held.append(anonymous_bytes())

    monkeypatch.setattr(bundle.model, "encode", encode)
    monkeypatch.setattr(bundle.model, "hidden_dim", width)
    monkeypatch.setattr(inference_files, "write_elem", writing)
    embed_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", bundle, batch_size=BATCH)
    assert max(held) - held[0] < 600 * width * 4 / 2
    assert (embedding(tmp_path / "out.h5ad")[:, -1] == np.arange(600)).all()
