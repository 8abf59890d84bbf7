"""Models on the Hugging Face Hub: a model folder goes up as plain files, and comes down from one exact commit.

Nothing that could run code travels: folders with pickles are refused, and only the files of a model folder are
fetched, by name. Their checksums travel with them (`bundle.json`). A branch can move, a commit cannot, so what is
pulled says its commit and where none is given a warning names the one to pin.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scmodelforge
from scmodelforge.data.shard_file import file_sha256
from scmodelforge.errors import ModelError, UserError, require_extra
from scmodelforge.files import new_folder, write_text
from scmodelforge.models.card import CARD

log = logging.getLogger(__name__)

NEEDED = ("config.yaml", "model.safetensors", "genes.parquet")
FILES = (*NEEDED, "labels.json", "training_cells.safetensors")
README = "README.md"  # what the Hub calls the model card
RECORD = "bundle.json"
FORMAT_VERSION = 1
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".joblib", ".dill")
COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
ADDRESS = re.compile(r"hf:/{1,2}([^@]*)(?:@(.+))?")  # a Path folds the two slashes into one


@dataclass(frozen=True)
class Commit:
    """One state of a repository: USER/NAME and the sha of the commit."""

    repo: str
    sha: str

    @property
    def address(self) -> str:
        """What `--model` takes."""
        return f"hf://{self.repo}@{self.sha}"


def push(
    folder: str | Path,
    to: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Commit:
    """Put a model folder on the Hub, as one commit; the repository is created if it is not there.

    Parameters
    ----------
    folder
        A model folder. It is loaded first, so that no broken one is shared.
    to
        USER/NAME of the repository.
    private
        Only for those who may see it. A repository that exists already has to be private then.
    revision
        The branch; created if it is not there. None: main.
    message
        Of the commit.

    Raises
    ------
    ModelError
        If the folder is no whole model folder, or holds pickles.
    UserError
        If the Hub cannot be reached or refuses.
    """
    from scmodelforge.models.bundle import load_model

    require_extra("huggingface_hub", "hub", "Sharing models on the Hugging Face Hub")
    folder, to = Path(folder), _repository(to)
    _require_safe(folder)
    config = load_model(folder).config
    _check_card(folder / CARD)
    if not private and (named := [path for path in config.data.paths if Path(path).is_absolute()]):
        log.warning("config.yaml names paths of this machine, which everyone will read there: %s", named[0])

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    uploads = {name: folder / name for name in FILES if (folder / name).is_file()}
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "scmodelforge": scmodelforge.__version__,
        "sha256": {name: file_sha256(path) for name, path in uploads.items()},
    }
    with _said_by_the_hub(to, revision, sending=True):
        api = HfApi()
        api.create_repo(to, private=private or None, exist_ok=True)
        if private and not api.model_info(to).private:
            raise UserError(
                f"'{to}' is public, and --private was asked. Nothing was sent. Make it private in its settings on the "
                "Hub, or choose another name."
            )
        if revision is not None:
            api.create_branch(to, branch=revision, exist_ok=True)
        gone = set(FILES) & set(api.list_repo_files(to, revision=revision)) - set(uploads)
        content: dict[str, Path | bytes] = {
            **uploads,
            README: folder / CARD,
            RECORD: (json.dumps(record, indent=2) + "\n").encode(),
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*about to commit a data file")  # genes.parquet
            done = api.create_commit(
                to,
                [
                    *(CommitOperationAdd(name, source) for name, source in content.items()),
                    *(CommitOperationDelete(name) for name in sorted(gone)),
                ],
                commit_message=message or f"Model of scModelForge {scmodelforge.__version__}",
                revision=revision,
            )
    return Commit(to, done.oid)


def pull(repo: str, output: str | Path, revision: str | None = None) -> Commit:
    """Fetch a model from the Hub into a new folder, and check it; `bundle.json` there says where it is from.

    Parameters
    ----------
    repo
        USER/NAME.
    output
        A folder that does not exist yet, or is empty; it is written whole or not at all.
    revision
        Commit, tag or branch. None: the newest commit of main, and a warning that names it.

    Raises
    ------
    ModelError
        If the repository holds no whole model of ours.
    UserError
        If the Hub cannot be reached or refuses, or there is no such repository or revision.
    """
    from scmodelforge.models.bundle import load_model

    require_extra("huggingface_hub", "hub", "Models from the Hugging Face Hub")
    repo = _repository(repo)
    with new_folder(output) as temporary:
        commit = _find(repo, revision)
        _download(commit, local_dir=temporary)
        shutil.rmtree(temporary / ".cache", ignore_errors=True)  # what the client notes for itself
        record = _check(temporary, commit)
        try:
            load_model(temporary)
        except ModelError as error:
            said = str(error).replace(str(temporary), str(output))
            raise ModelError(f"The model '{repo}' at {commit.sha} cannot be used here: {said}") from error
        if (temporary / README).is_file():
            (temporary / README).rename(temporary / CARD)
        source = {"repo": repo, "commit": commit.sha, "revision": revision}
        write_text(temporary / RECORD, json.dumps({**record, "source": source}, indent=2) + "\n")
    return commit


def is_address(model: str | Path) -> bool:
    """Whether a model is named by its place on the Hub: hf://USER/NAME@REVISION."""
    return ADDRESS.fullmatch(str(model)) is not None


def local_path(model: str | Path) -> Path:
    """Where a model lies on this machine: its own path, or for an address on the Hub a folder in the Hub's cache.

    It is fetched if it is not there, and checked. With a commit as revision it is fetched once, then needs no network.

    Raises
    ------
    UserError
        As `pull`.
    """
    found = ADDRESS.fullmatch(str(model))
    if found is None:
        return Path(model)
    require_extra("huggingface_hub", "hub", "Models from the Hugging Face Hub")
    repo, revision = _repository(found[1]), found[2]
    if revision is not None and COMMIT.fullmatch(revision):
        from huggingface_hub.errors import LocalEntryNotFoundError

        with suppress(LocalEntryNotFoundError):
            folder = _download(Commit(repo, revision), local_files_only=True)
            _check(folder, Commit(repo, revision))
            return folder
    commit = _find(repo, revision)
    folder = _download(commit)
    _check(folder, commit)
    return folder


def pinned(model: str, folder: Path) -> str:
    """What `model` is called: an address on the Hub with the commit whose folder in the cache this is; else itself."""
    found = ADDRESS.fullmatch(model)
    return model if found is None else Commit(found[1], folder.name).address


def _repository(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UserError(
            f"'{name}' is no repository of the Hub; it must be USER/NAME, for example lab/pbmc-10m."
        )
    return name


def _require_safe(folder: Path) -> None:
    """Refuse what is no folder, and folders with pickles."""
    if folder.is_file():
        raise ModelError(
            f"'{folder}' is a file. Share the model folder: 'model' in the run folder, or what save_bundle wrote."
        )
    if not folder.is_dir():
        raise ModelError(f"The model folder '{folder}' does not exist.")
    if (folder / "model" / "model.safetensors").is_file():
        raise ModelError(f"'{folder}' is a run folder. Share the model in it: --model {folder / 'model'}")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if pickles := [path for path in files if path.suffix.lower() in PICKLES]:
        raise ModelError(
            f"'{pickles[0]}' is a pickle or a checkpoint, which can run code where it is loaded, so folders with such "
            "files are not shared. Take it out of the folder; model.safetensors holds the weights."
        )
    ours = {folder / name for name in (*FILES, CARD, RECORD)}
    if others := [path.relative_to(folder).as_posix() for path in files if path not in ours]:
        log.info("Not part of a model folder, and not sent: %s", ", ".join(others))


def _check_card(path: Path) -> None:
    """Refuse a card that the Hub could not read, and say if it names no license."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        text = path.read_text(encoding="utf-8")
        head = ModelCard(text).data.to_dict() if text.startswith("---") else {}
    except OSError as error:
        raise ModelError(f"The model folder has no card: '{path}' cannot be read.") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ModelError(f"The YAML head of '{path}' is not one that the Hub can read: {error}") from error
    if "library_name" not in head:
        log.warning("%s has no YAML head with library_name: the Hub will not list it as one.", path)
    if "license" not in head:
        log.warning("%s names no license, so nobody may use the model. Write one into its head.", path)


def _find(repo: str, revision: str | None) -> Commit:
    """The commit of a revision; refuses, before anything is fetched, a repository without a model of ours."""
    from huggingface_hub import HfApi

    with _said_by_the_hub(repo, revision):
        info = HfApi().model_info(repo, revision=revision)
    names = {sibling.rfilename for sibling in info.siblings or []}
    _require_needed(names, repo)
    assert info.sha is not None
    if revision is None:
        log.warning(
            "No revision was given for %s, so the newest commit was taken, which may be another one tomorrow. To pin "
            "it: %s",
            repo,
            info.sha,
        )
    elif not COMMIT.fullmatch(revision):
        log.info("%s of %s is commit %s.", revision, repo, info.sha)
    return Commit(repo, info.sha)


def _require_needed(names: Collection[str], repo: str) -> None:
    if missing := [name for name in NEEDED if name not in names]:
        held = ", ".join(sorted(names)[:8]) or "nothing"
        pickles = any(name.lower().endswith(PICKLES) for name in names)
        why = " Its weights are pickles, which are never fetched, as they can run code." if pickles else ""
        raise ModelError(
            f"'{repo}' holds no model of scModelForge: it has no {', '.join(missing)}.{why}\nIt holds: {held}.\n"
            "For published weights of other families, fetch the folder and use 'scmodelforge import'."
        )


def _download(commit: Commit, **where: Any) -> Path:
    from huggingface_hub import snapshot_download

    allowed = [*FILES, README, RECORD]
    with _said_by_the_hub(commit.repo, commit.sha):
        return Path(snapshot_download(commit.repo, revision=commit.sha, allow_patterns=allowed, **where))


def _check(folder: Path, commit: Commit) -> dict[str, Any]:
    """Compare the files of a folder with their record, and return it.

    Raises
    ------
    ModelError
        If a file is missing, left over or another one.
    """
    held = {name for name in FILES if (folder / name).is_file()}
    _require_needed(held, commit.repo)
    if not (folder / RECORD).is_file():
        log.warning("%s has no %s: its files cannot be compared with what was pushed.", commit.repo, RECORD)
        return {"format_version": FORMAT_VERSION}
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        version, sums = record["format_version"], dict(record["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{RECORD} of '{commit.repo}' at {commit.sha} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise ModelError(
            f"'{commit.repo}' has a {RECORD} of format {version}, this version reads {FORMAT_VERSION}: update "
            "scModelForge."
        )
    found = {name: file_sha256(folder / name) for name in sorted(held)}
    if wrong := sorted(name for name in sums.keys() | held if sums.get(name) != found.get(name)):
        raise ModelError(
            f"The model '{commit.repo}' at {commit.sha} is not as it was pushed: {', '.join(wrong)} differs from the "
            f"checksum in {RECORD}. Take another revision, or ask its author to push it again."
        )
    return record


@contextmanager
def _said_by_the_hub(repo: str, revision: str | None, sending: bool = False) -> Iterator[None]:
    """Turn what the Hub and its client refuse into sentences; no header, and so no token, is in them."""
    from huggingface_hub import errors

    at = f" at revision '{revision}'" if revision else ""
    log_in = "Log in with 'hf auth login', or set HF_TOKEN."
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"'{repo}' is gated: its owner decides who may have it. Ask for access on its page, then: {log_in}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"The Hub has no repository '{repo}', or it is private and you may not see it. Check the name. {log_in}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"'{repo}' has no revision '{revision}': it is no commit, tag or branch there. Its page lists them."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if error.__cause__ is None:  # only the cache was asked
            raise
        raise UserError(_unreachable(error.__cause__, repo, sending)) from error
    except errors.HfHubHTTPError as error:
        raise UserError(_refusal(error, repo, at, log_in)) from error
    except (errors.OfflineModeIsEnabled, errors.HTTPError) as error:
        raise UserError(_unreachable(error, repo, sending)) from error
    except (RuntimeError, ValueError) as error:  # an upload that broke off, an answer that makes no sense
        raise UserError(f"The exchange with the Hub about '{repo}'{at} failed: {error}") from error


def _unreachable(error: BaseException, repo: str, sending: bool) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        instead = "Unset it to send the model." if sending else "Unset it, or use a commit fetched before."
        return f"HF_HUB_OFFLINE is set, so '{repo}' was not looked up. {instead}"
    instead = (
        "Nothing may have arrived: push again when the Hub can be reached."
        if sending
        else "A model that was pulled before can be used from its folder."
    )
    return (
        f"The Hub ({constants.ENDPOINT}) cannot be reached for '{repo}'. Check the network, a proxy and HF_ENDPOINT. "
        f"{instead}"
    )


def _refusal(error: Any, repo: str, at: str, log_in: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"The Hub does not know who you are, and '{repo}' needs that. {log_in}"
    if status == 403:
        return f"Your token may not do this with '{repo}'. It needs the right to write there. {log_in}"
    said = f": {error.server_message}" if error.server_message else ""
    return f"The Hub refused the request about '{repo}'{at} with status {status}{said}. Try again later."
