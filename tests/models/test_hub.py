"""Models travel over the Hub byte for byte, from a pinned commit, without pickles, and what goes wrong is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from huggingface_hub import close_session, constants

from scmodelforge.errors import ModelError, UserError
from scmodelforge.inference import embed
from scmodelforge.models.bundle import load_model, save_bundle
from scmodelforge.models.hub import pull, push
from scmodelforge.training.run import RunResult
from tests.helpers import marker_cells
from tests.hub_server import TOKEN, Hub, running_hub
from tests.journeys.command import call, done, refused

NAME = "lab/pbmc"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub on this machine that this process talks to, logged in, with an empty cache."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
        close_session()  # its connections are to a server that ends here


@pytest.fixture
def folder(annotator: RunResult, tmp_path: Path) -> Path:
    """A model folder, to be changed."""
    return Path(shutil.copytree(annotator.run_dir / "model", tmp_path / "mine"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_push_then_pull_gives_the_same_bytes_and_embeddings(hub: Hub, folder: Path, tmp_path: Path) -> None:
    said = done("push", "--model", folder, "--to", NAME, "--message", "first", "--private")
    repository = hub.repositories[NAME]
    sha = repository.refs["main"]
    assert repository.private
    assert repository.messages[-1] == "first"
    assert sha in said.out
    assert repository.commits[sha]["README.md"] == (folder / "model_card.md").read_bytes()
    pulled = done("pull", NAME, "--revision", sha, "--output", tmp_path / "theirs")
    assert sha in pulled.out
    assert "Warning" not in pulled.err
    theirs = files(tmp_path / "theirs")
    record = json.loads(theirs.pop("bundle.json"))
    assert record["source"] == {"repo": NAME, "commit": sha, "revision": sha}
    assert theirs == files(folder)
    cells = marker_cells(20)
    ours, same = (embed(cells, load_model(path), copy=True) for path in (folder, tmp_path / "theirs"))
    assert np.array_equal(ours.obsm["X_scmodelforge"], same.obsm["X_scmodelforge"])
    again = done("push", "--model", tmp_path / "theirs", "--to", "lab/copy")  # a pulled one can be pushed on
    assert "lab/copy" in again.out
    assert TOKEN not in said.out + said.err + pulled.out + pulled.err


def test_commands_talk_to_the_hub_of_the_environment(folder: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        code = "from scmodelforge.cli import main; main()"
        arguments = ["push", "--model", str(folder), "--to", NAME]
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    assert hub.repositories[NAME].refs["main"] in run.stdout
    assert "license" in run.stderr
    assert "data file" not in run.stderr
    assert TOKEN not in run.stdout + run.stderr


def test_a_revision_pins_a_model_that_main_has_left(
    hub: Hub, folder: Path, pretrained: RunResult, tmp_path: Path
) -> None:
    first = push(folder, NAME)
    second = push(pretrained.run_dir / "model", NAME)
    assert "labels.json" not in hub.repositories[NAME].commits[second.sha]  # not left over from the first
    assert pull(NAME, tmp_path / "old", first.sha) == first
    assert load_model(tmp_path / "old").labels is not None
    hub.repositories[NAME].refs["v1"] = first.sha
    assert pull(NAME, tmp_path / "tag", "v1") == first
    newest = call("pull", NAME, "--output", tmp_path / "new")
    assert newest.code == 0
    assert "Warning: No revision was given" in newest.err
    assert second.sha in newest.err
    assert load_model(tmp_path / "new").labels is None


def test_a_branch_is_made_and_main_stays(hub: Hub, folder: Path, tmp_path: Path) -> None:
    main = push(folder, NAME)
    other = push(folder, NAME, revision="try", message="try it")
    assert hub.repositories[NAME].refs == {"main": main.sha, "try": other.sha}
    assert pull(NAME, tmp_path / "theirs", "try") == other


def test_a_model_is_named_by_its_address(hub: Hub, folder: Path, tmp_path: Path) -> None:
    commit = push(folder, NAME)
    marker_cells(20).write_h5ad(tmp_path / "cells.h5ad")
    out = tmp_path / "out.h5ad"
    said = done("embed", "--model", commit.address, "--data", tmp_path / "cells.h5ad", "--output", out)
    assert "Warning" not in said.err
    direct = embed(marker_cells(20), folder)
    assert np.array_equal(ad.read_h5ad(out).obsm["X_scmodelforge"], direct.obsm["X_scmodelforge"])
    hub.asked.clear()
    load_model(commit.address)
    assert hub.asked == []  # a commit is fetched once
    many = done(
        "embed", "--model", commit.address, "--data", tmp_path / "*.h5ad", "--output", tmp_path / "many"
    )
    assert "2 files" in many.out
    warned = done("tokens", tmp_path / "cells.h5ad", "--model", f"hf://{NAME}")
    assert f"To pin it: {commit.sha}" in warned.err


def test_folders_with_pickles_or_without_a_model_are_not_pushed(
    hub: Hub, folder: Path, annotator: RunResult, tmp_path: Path
) -> None:
    to = ("--to", NAME)
    run = annotator.run_dir
    refused("push", "--model", run, *to, words=("run folder", str(run / "model")))
    refused("push", "--model", run / "checkpoints/best.ckpt", *to, words=("is a file", "model folder"))
    refused("push", "--model", tmp_path / "gone", *to, words=("does not exist",))
    (folder / "old").mkdir()
    for name in ("last.ckpt", "old/pytorch_model.BIN", "x.pkl", "y.pt"):
        (folder / name).write_bytes(b"")
        refused("push", "--model", folder, *to, words=(name, "can run code"))
        (folder / name).unlink()
    (folder / "notes.txt").write_text("mine")
    assert "not sent: notes.txt" in done("push", "--model", folder, *to).err
    assert "notes.txt" not in hub.repositories[NAME].commits[hub.repositories[NAME].refs["main"]]
    card = (folder / "model_card.md").read_text()
    (folder / "model_card.md").write_text(card.replace("tags:", "tags: [", 1))
    refused("push", "--model", folder, *to, words=("YAML head", "model_card.md"))
    (folder / "config.yaml").unlink()
    refused("push", "--model", folder, *to, words=("not a model folder", "config.yaml"))


def test_paths_of_this_machine_are_pointed_out(
    hub: Hub, pretrained: RunResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = pretrained.model
    data = bundle.config.data.model_copy(update={"paths": ["/home/me/secret.h5ad"]})
    named = replace(bundle, config=bundle.config.model_copy(update={"data": data}))
    folder = save_bundle(named, tmp_path / "model")
    assert "/home/me" not in (folder / "model_card.md").read_text()
    push(folder, "lab/hidden", private=True)
    assert "paths of this machine" not in caplog.text
    push(folder, NAME)
    assert "everyone will read there: /home/me/secret.h5ad" in caplog.text


def test_the_extra_is_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ("huggingface_hub", "pip install 'scmodelforge[hub]'")
    refused("push", "--model", folder, "--to", NAME, words=words)
    refused("pull", NAME, "--output", tmp_path / "theirs", words=words)
    (tmp_path / "cells.h5ad").touch()
    refused("tokens", tmp_path / "cells.h5ad", "--model", f"hf://{NAME}", words=words)


def test_private_is_not_taken_for_granted(hub: Hub, folder: Path) -> None:
    hub.repository(NAME)
    before = dict(hub.repositories[NAME].commits)
    refused("push", "--model", folder, "--to", NAME, "--private", words=("is public", "Nothing was sent"))
    assert hub.repositories[NAME].commits == before


def test_repositories_without_a_model_of_ours(hub: Hub, tmp_path: Path) -> None:
    bert = {"config.json": b"{}", "pytorch_model.bin": b"\x80", "model.safetensors": b"large"}
    hub.repository("them/bert").commit(bert)
    words = ("holds no model of scModelForge", "config.yaml, genes.parquet", "pickles", "config.json")
    refused("pull", "them/bert", "--output", tmp_path / "bert", words=words)
    assert not (tmp_path / "bert").exists()
    assert not any("resolve" in path for _, path in hub.asked)  # nothing was fetched
    (tmp_path / "cells.h5ad").touch()
    refused("tokens", tmp_path / "cells.h5ad", "--model", "hf://them/bert", words=words)


def test_only_the_files_of_a_model_are_fetched(hub: Hub, folder: Path, tmp_path: Path) -> None:
    pushed = push(folder, NAME)
    content = hub.repositories[NAME].commits[pushed.sha]
    hub.repositories[NAME].commit(content | {"run_me.py": b"print()", "extra/model.safetensors": b"x"})
    pull(NAME, tmp_path / "theirs")
    assert set(files(tmp_path / "theirs")) == {*files(folder), "bundle.json"}
    assert not any("run_me" in path or "extra" in path for _, path in hub.asked)


def test_a_model_that_was_changed_after_it_was_pushed(hub: Hub, folder: Path, tmp_path: Path) -> None:
    pushed = push(folder, NAME)
    content = hub.repositories[NAME].commits[pushed.sha]
    labels = content["labels.json"].replace(b"NK", b"KN")
    changed = hub.repositories[NAME].commit(content | {"labels.json": labels})
    with pytest.raises(ModelError, match=r"not as it was pushed: labels\.json differs") as error:
        pull(NAME, tmp_path / "theirs", changed)
    assert changed in str(error.value)
    assert not (tmp_path / "theirs").exists()
    unknown = hub.repositories[NAME].commit({**content, "bundle.json": b"[]"})
    with pytest.raises(ModelError, match=r"bundle\.json of 'lab/pbmc' .* is damaged"):
        pull(NAME, tmp_path / "theirs", unknown)
    bare = dict(content)
    del bare["bundle.json"]
    hub.repositories[NAME].commit(bare | {"genes.parquet": b"PAR1"})
    with pytest.raises(ModelError, match="cannot be used here") as error:
        pull(NAME, tmp_path / "theirs")
    assert "theirs" in str(error.value)
    assert ".tmp" not in str(error.value)


def test_what_the_hub_refuses_is_said(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = push(folder, NAME)
    out = ("--output", tmp_path / "theirs")
    refused("pull", "lab/gone", *out, words=("no repository 'lab/gone'", "hf auth login"))
    refused("pull", NAME, *out, "--revision", "v9", words=("no revision 'v9'",))
    refused("pull", "pbmc", *out, words=("USER/NAME",))
    refused("pull", "../../x/y", *out, words=("USER/NAME",))
    hub.repositories[NAME].gated = True
    refused("pull", NAME, *out, words=("is gated", "Ask for access"))
    refused("push", "--model", folder, "--to", "somebody-else/x", words=("right to write",))
    monkeypatch.setenv("HF_TOKEN", "hf_wrongTokenOfTheTests")
    said = refused("push", "--model", folder, "--to", NAME, words=("'lab/pbmc'", "HF_TOKEN"))
    assert "hf_wrong" not in said
    assert not (tmp_path / "theirs").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("pull", NAME, *out, words=("HF_HUB_OFFLINE",))
    refused("push", "--model", folder, "--to", NAME, words=("HF_HUB_OFFLINE", "Unset it to send the model"))
    cells = tmp_path / "cells.h5ad"
    cells.touch()
    refused("tokens", cells, "--model", commit.address, words=("HF_HUB_OFFLINE",))


def test_no_network(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9\) cannot be reached"):
        pull(NAME, tmp_path / "theirs")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9\) cannot be reached") as error:
        push(folder, NAME)
    assert "push again" in str(error.value)
    assert "pulled" not in str(error.value)
