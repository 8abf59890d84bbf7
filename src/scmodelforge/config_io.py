"""Configs in and out: YAML files and overrides, schema, comparison, and starter files for new data.

How a file is read and what an error looks like is in `config_reading`. Imports yaml and pydantic only.
"""

from __future__ import annotations

import logging
import textwrap
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scmodelforge import registry
from scmodelforge.config import Config, Section
from scmodelforge.config_reading import Reading, plain_value, show
from scmodelforge.errors import ConfigError

logger = logging.getLogger(__name__)


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    sections: Collection[str] | None = None,
    require_data: bool = False,
) -> Config:
    """Read a YAML file, apply overrides and check everything.

    Parameters
    ----------
    path
        The YAML file; None: the defaults.
    overrides
        `key=value` with dotted keys ("training.max_epochs=3"); the value is YAML ("[a.h5ad, b.h5ad]").
    sections
        Top-level sections that the command uses; None: all. Others are checked: a file is shared by many commands. An
        override of one of them is said to have no effect.
    require_data
        Demand `data.paths`, expand `~` and patterns, and check that every file named exists.

    Raises
    ------
    ConfigError
        Naming all that is wrong, each with its line.
    """
    reading = Reading(str(path) if path is not None else "config")
    data = reading.parse(_read_text(Path(path))) if path is not None else {}
    config = _finish(reading, data, overrides, require_data)
    asked = {str(loc[0]) for loc in reading.overridden}  # on the command line, so meant for this command
    if idle := asked.difference(sections or Config.model_fields):
        logger.warning("--set: not used by this command: %s.", ", ".join(sorted(idle)))
    return config


def parse_config(
    values: Mapping[str, Any], overrides: Sequence[str] = (), require_data: bool = False
) -> Config:
    """Do what `load_config` does, for a config that is already a dictionary; it is not changed."""
    return _finish(Reading("config"), dict(values), overrides, require_data)


def check_paths(config: Config) -> Config:
    """Return `config` with `~` in its paths and patterns in `data.paths` expanded.

    Raises
    ------
    ConfigError
        If no path is given, or a data file, gene vocabulary or table of medians does not exist.
    """
    reading = Reading("config")
    config = reading.resolve_paths(config, set())
    reading.raise_if_wrong()
    return config


def _read_text(path: Path) -> str:
    """Return the file as text, or say why it cannot be read."""
    if not path.exists():
        raise ConfigError(
            f"The config file '{path}' does not exist (working folder: {Path.cwd()}).\n"
            "Check the path, or write a starter config with: scmodelforge init DATA.h5ad"
        )
    if path.is_dir():
        raise ConfigError(f"'{path}' is a folder; --config needs a YAML file.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The config file '{path}' cannot be read: {error.strerror}.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: the file is not UTF-8 text. A config is a text file in YAML; save it as UTF-8."
        ) from error


def _finish(reading: Reading, data: dict[Any, Any], overrides: Sequence[str], require_data: bool) -> Config:
    for override in overrides:
        data = reading.override(data, override)
    config, dropped = reading.validate(data)
    if config is not None and require_data:
        config = reading.resolve_paths(config, dropped)
    reading.raise_if_wrong()
    assert config is not None  # no config without a problem
    return config


# --- comparing and writing ------------------------------------------------------------------------


def differences(asked: Section, have: Section, prefix: str = "") -> list[str]:
    """List the keys that the user wrote in `asked` and whose value in `have` (the model's) is another.

    Keys left at their default in `asked` are no wishes, so they are not compared. `prefix` is put
    before each key: `differences(config.tokenizer, bundle.tokenizer, "tokenizer")`.
    """
    lines: list[str] = []
    wanted, present = asked.model_dump(mode="json"), have.model_dump(mode="json")
    for key in type(asked).model_fields:
        if key not in asked.model_fields_set:
            continue
        name = f"{prefix}.{key}" if prefix else key
        mine, theirs = getattr(asked, key), getattr(have, key)
        if isinstance(mine, Section) and type(mine) is type(theirs):
            lines += differences(mine, theirs, name)
        elif wanted[key] != present[key]:
            a, b = plain_value(wanted[key]), plain_value(present[key])
            lines.append(f"{name}: {a} in the config, {b} in the model")
    return lines


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of a config, for editors that complete and check YAML."""
    schema = Config.model_json_schema()
    for section, key, names in (
        ("TokenizerConfig", "strategy", registry.TOKENIZERS),
        ("ModelConfig", "architecture", registry.ARCHITECTURES),
        ("ModelConfig", "pretraining_task", registry.TASKS),
    ):
        schema["$defs"][section]["properties"][key]["enum"] = names.names
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def to_yaml(config: Section, comments: bool = False) -> str:
    """Return `config` as YAML with every default written out; `comments` puts its help above each key."""
    if comments:
        return "\n".join(_commented(config, ""))[1:] + "\n"
    return _dump(config.model_dump(mode="json"))


def _dump(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)


def _commented(section: Section, indent: str) -> Iterator[str]:
    values = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if not indent:
            yield ""
        for line in textwrap.wrap(_help(info, value), 106 - len(indent)):
            yield f"{indent}# {line}"
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _commented(value, indent + "  ")
        else:
            yield textwrap.indent(_dump({name: values[name]}).rstrip("\n"), indent)


def _help(info: FieldInfo, value: Any) -> str:
    """Return what a key means, which values it takes and, if changed, its default."""
    text = info.description or (type(value).__doc__ or "").partition("\n")[0]
    choices = [str(choice) for choice in _choices(info.annotation)]
    if any(choice not in text for choice in choices):
        text += f" One of: {', '.join(choices)}."
    if (default := info.get_default()) not in (None, PydanticUndefined, value):
        text += f" (Default: {show(default)}.)"
    return text


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    return next((c for argument in typing.get_args(annotation) if (c := _choices(argument))), ())


@dataclass(frozen=True)
class Suggestions:
    """What a look at an h5ad file suggests for its starter config; None keeps the default.

    Attributes
    ----------
    layer
        Where the raw counts are: None for X, "raw", or a layer.
    gene_column
        var column with the gene ids; None: found by itself.
    gene_vocab
        The vocabulary that fits the species.
    label_key, batch_key, group_key
        obs columns with labels, technical batches, and the groups (donors) that splits keep whole.
    batch_size, warmup_steps
        What fits the number of cells.
    model
        Keys of the model section, such as a smaller `hidden_dim` for few cells.
    """

    layer: str | None = None
    gene_column: str | None = None
    gene_vocab: str | None = None
    label_key: str | None = None
    batch_key: str | None = None
    group_key: str | None = None
    batch_size: int | None = None
    warmup_steps: int | None = None
    model: Mapping[str, Any] = field(default_factory=dict)


def starter_yaml(
    path: str | Path, suggestions: Suggestions = Suggestions(), overrides: Sequence[str] = ()
) -> str:
    """Return a commented config for the h5ad file at `path`: every key, its help and a fitting value.

    `overrides` ("key=value") win over the suggestions; with a preset the model is as large as published.

    Raises
    ------
    ConfigError
        If a suggestion or an override is impossible.
    """
    hint = suggestions
    if any(override.partition("=")[0].strip() == "model.preset" for override in overrides):
        hint = replace(hint, model={})
    labels = {"cell_type_key": hint.label_key}
    values = {
        "data": {
            "paths": [str(path)],
            "layer": hint.layer,
            "gene_column": hint.gene_column,
            "gene_vocab": hint.gene_vocab,
            "split": {"group_key": hint.group_key},
        },
        "model": dict(hint.model),
        "training": {"batch_size": hint.batch_size, "scheduler": {"warmup_steps": hint.warmup_steps}},
        "eval": {
            "benchmarks": [
                {"name": "linear_probe", "params": {**labels, "group_key": hint.group_key}},
                {"name": "embedding_quality", "params": {**labels, "batch_key": hint.batch_key}},
            ]
        },
        "finetune": {"label_key": hint.label_key},
    }
    title = (
        f"# scModelForge: starter config for {path}\n"
        "# scmodelforge train --config THIS_FILE, then finetune and benchmark with the same file.\n"
        "# Every key is here with its help; what you delete takes its default.\n\n"
    )
    return title + to_yaml(parse_config(_without_none(values), overrides), comments=True)


def _without_none(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_none(value) for key, value in values.items() if value is not None}
    return [_without_none(value) for value in values] if isinstance(values, list) else values
