"""Published model families: folders that their authors wrote, read as models of ours and written again.

Each family is a module with `read_published(folder, **options)` and `write_published(bundle, folder)`, and plain
functions between their names of weights and ours.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from scmodelforge.errors import ModelError, UserError
from scmodelforge.files import new_folder

if TYPE_CHECKING:
    from scmodelforge.models.bundle import ModelBundle

FAMILIES = ("geneformer", "scgpt", "transcriptformer")
FILES = {  # without which no folder is one of the family
    "geneformer": ("config.json",),
    "scgpt": ("args.json", "best_model.pt", "vocab.json"),
    "transcriptformer": ("config.json", "model_weights.pt", "vocabs"),
}
FORMATS = {"huggingface-bert": "geneformer", "scgpt": "scgpt", "transcriptformer": "transcriptformer"}


def import_model(family: str, folder: str | Path, dictionaries: str | Path | None = None) -> ModelBundle:
    """Read a folder of published weights.

    Parameters
    ----------
    family
        One of `FAMILIES`.
    folder
        Where the authors' files lie.
    dictionaries
        Geneformer: the folder with the dictionaries of its tokenizer, if they are not in `folder`.

    Raises
    ------
    UserError
        If the folder is not one of that family, damaged, or a file of it is missing.
    """
    folder = Path(folder)
    if family not in FAMILIES:
        raise UserError(f"There is no family '{family}' to import from; there are {', '.join(FAMILIES)}.")
    if not folder.is_dir():
        raise ModelError(f"'{folder}' is not a folder; the folder with the published files is needed.")
    options = {} if dictionaries is None else {"dictionaries": Path(dictionaries)}
    if options and family != "geneformer":
        raise UserError(
            f"--dictionaries belongs to geneformer; a folder of {family} holds its own vocabulary."
        )
    if options and not options["dictionaries"].is_dir():
        raise ModelError(f"'{dictionaries}' is not a folder; the one with the dictionaries is needed.")
    found = family_of(folder)
    if found not in (family, None):
        raise ModelError(f"'{folder}' is no folder of {family}: it looks like {LOOKS[found]}.")
    if missing := [name for name in FILES[family] if not (folder / name).exists()]:
        raise ModelError(
            f"'{folder}' is no folder of {family}: it has no {', '.join(missing)}. Name the folder that holds "
            "the published files."
        )
    return _module(family).read_published(folder, **options)


def export_model(model: ModelBundle | str | Path, kind: str, folder: str | Path) -> Path:
    """Write a model as the authors of a family do; the folder is written whole or not at all.

    Parameters
    ----------
    model
        What `load_model` returned, or the path of a checkpoint or model folder.
    kind
        One of `FORMATS`.
    folder
        A folder that does not exist yet, or is empty.

    Raises
    ------
    UserError
        If the format cannot hold the model, or the folder cannot be written.
    """
    if kind not in FORMATS:
        raise UserError(f"There is no format '{kind}' to export to; there are {', '.join(FORMATS)}.")
    from scmodelforge.models.bundle import load_model  # loads torch

    bundle = load_model(model) if isinstance(model, str | Path) else model
    with new_folder(folder) as temporary:
        _module(FORMATS[kind]).write_published(bundle, temporary)
    return Path(folder)


LOOKS = {
    "geneformer": "a BERT of transformers (--from geneformer)",
    "scgpt": "one of scGPT (--from scgpt)",
    "transcriptformer": "one of TranscriptFormer (--from transcriptformer)",
    "ours": "a model folder of scModelForge, which needs no import",
}


def family_of(folder: Path) -> str | None:
    """What the files of a folder look like: a key of `LOOKS`, or None."""
    if (folder / "config.yaml").is_file() and (folder / "genes.parquet").is_file():
        return "ours"
    if (folder / "args.json").is_file() and (folder / "vocab.json").is_file():
        return "scgpt"
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(settings, dict):
        return None
    if "model" in settings:
        return "transcriptformer"
    return "geneformer" if settings.get("model_type") == "bert" else None


def _module(family: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"scmodelforge.models.published.{family}")
