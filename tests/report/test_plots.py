"""The pictures: that they are drawn, say what they should, and leave nothing half-written."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest

from scmodelforge.errors import DataError, UserError
from scmodelforge.report.plots import plot_loss, plot_umap

PNG = b"\x89PNG"


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    steps = np.arange(1, 101)
    train = pd.DataFrame({"step": steps, "train_loss": 5 / steps, "val_loss": np.nan})
    pd.concat([train, pd.DataFrame({"step": [50, 100], "val_loss": [1.0, 0.5]})]).to_csv(path, index=False)
    return path


def test_loss_curve_names_both_curves(metrics, tmp_path):
    plot_loss(metrics, tmp_path / "new" / "loss.svg")
    picture = (tmp_path / "new" / "loss.svg").read_text()
    assert all(
        f"<!-- {text} -->" in picture for text in ("training (running mean)", "validation", "optimizer step")
    )
    assert os.listdir(tmp_path / "new") == ["loss.svg"]


def test_one_kind_of_loss_is_enough(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss\n1,2.0\n2,1.0\n")
    plot_loss(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_loss_tables_that_cannot_be_drawn(tmp_path):
    table = tmp_path / "metrics.csv"
    with pytest.raises(DataError, match=r"Cannot read the metrics table '.*metrics.csv'"):
        plot_loss(table, tmp_path / "loss.png")
    table.write_text("step,train_loss,val_loss\n1,,\n")
    with pytest.raises(DataError, match=r"holds no loss(.|\n)*columns: step, train_loss, val_loss"):
        plot_loss(table, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_unknown_picture_format(metrics, tmp_path):
    with pytest.raises(UserError, match=r"'.docx' is no picture format(.|\n)*png"):
        plot_loss(metrics, tmp_path / "loss.docx")


def test_umap_is_the_same_each_time_and_keeps_clusters_apart(tmp_path):
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], 60)
    embedding = (rng.normal(size=(120, 5)) + 50 * codes[:, None]).astype(np.float32)
    labels = np.array(["T cell", "B cell"], dtype=object)[codes]
    labels[:3] = [None, np.nan, ""]
    first = plot_umap(embedding, labels, tmp_path / "umap.svg", "my cells")
    again = plot_umap(embedding, labels, tmp_path / "umap.png", "my cells")
    np.testing.assert_array_equal(first, again)
    assert first.shape == (120, 2)
    centres = np.stack([first[codes == 0].mean(0), first[codes == 1].mean(0)])
    distance = np.linalg.norm(first[:, None] - centres, axis=2)
    assert (distance.argmin(axis=1) == codes).all()
    picture = (tmp_path / "umap.svg").read_text()
    assert all(f"<!-- {text} -->" in picture for text in ("my cells", "T cell", "B cell", "unlabelled"))
    assert (tmp_path / "umap.png").read_bytes().startswith(PNG)


def test_many_classes_are_numbered(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.array([f"type {i % 70}" for i in range(210)])
    plot_umap(rng.normal(size=(210, 5)).astype(np.float32), labels, tmp_path / "umap.svg", "70 classes")
    picture = (tmp_path / "umap.svg").read_text()
    assert "<!-- 1  type 0 -->" in picture
    assert "<!-- 70  type 9 -->" in picture


def test_too_few_cells_for_a_umap(tmp_path):
    with pytest.raises(DataError, match="at least 10 cells, and there are 4"):
        plot_umap(np.zeros((4, 2), np.float32), np.array(list("abcd")), tmp_path / "umap.png", "few")
