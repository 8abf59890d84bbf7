"""Write docs/config.md from the config tree, so that the page says what the code reads.

Run `python scripts/build_config_reference.py`; a test compares the committed page with `reference()`.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scmodelforge.config import Config
from scmodelforge.config_eval import BuiltInSpec

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
INTRO = """\
# Config keys

<!-- Written by scripts/build_config_reference.py from src/scmodelforge/config.py; do not edit by hand. -->

One YAML file serves every command. Each takes from it what it needs; a key that you leave out has its default.
An unknown key is an error that names the nearest known one. `--set KEY=VALUE` overrides any key on the command
line, with the names below: `--set training.max_epochs=3`, `--set "data.paths=[a.h5ad, b.h5ad]"`.
"""
BETWEEN = """\
## Benchmarks

`eval.benchmarks` is a list. Each entry has a `name`, which decides what `params` it takes, and a `dataset`, which
is what the data are called in the results:

```yaml
eval:
  benchmarks:
    - name: linear_probe
      dataset: pbmc
      params: {cell_type_key: cell_type}
    - name: embedding_quality
      dataset: pbmc
      params: {cell_type_key: cell_type, batch_key: batch}
```
"""
NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", types.NoneType: "null"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The config sections that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in _sections(part)]


def _type(annotation: Any) -> str:
    """A type in plain words."""
    arguments = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return ", ".join(f"`{choice}`" for choice in arguments)
        case typing.Annotated:
            return _type(arguments[0])
        case origin if origin is list:
            return "list of benchmarks" if _sections(annotation) else f"list of {_type(arguments[0])}"
        case origin if origin is dict:
            return f"{_type(arguments[1])} for each name"
        case origin if origin is tuple:
            return f"{len(arguments)} {_type(arguments[0])}s"
        case origin if origin is dict:
            return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
        case typing.Union | types.UnionType:
            return " or ".join(_type(part) for part in arguments)
    return "section" if _sections(annotation) else NAMES[annotation]


def _bounds(info: FieldInfo) -> str:
    """Bounds of a number, such as "≥ 0, < 1"."""
    found = [(sign, getattr(rule, name, None)) for rule in info.metadata for name, sign in BOUNDS.items()]
    return ", ".join(f"{sign} {limit:,}" for sign, limit in found if limit is not None)


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, list) and any(isinstance(item, BaseModel) for item in value):
        return ", ".join(item.name for item in value)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _table(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """Rows of a section, each sub-section's keys after it."""
    for name, info in section.model_fields.items():
        inner = _sections(info.annotation)
        is_list = typing.get_origin(info.annotation) is list
        if len(inner) == 1 and not is_list and info.default is not None:
            yield from _table(inner[0], f"{prefix}{name}.")
            continue
        kind = ", ".join(filter(None, [_type(info.annotation), _bounds(info)]))
        meaning = re.sub(r"<\w+>", r"`\g<0>`", info.description or "")  # or the browser takes tokens for tags
        yield f"| `{prefix}{name}` | {kind} | {_default(info)} | {meaning} |"
        if inner and not is_list:  # an optional section
            yield from _table(inner[0], f"{prefix}{name}.")


def _page_section(title: str, section: type[BaseModel], prefix: str) -> Iterator[str]:
    doc = (section.__doc__ or "").strip()
    yield from ("", title, "", doc, "", "| key | value | default | meaning |", "|---|---|---|---|")
    yield from _table(section, prefix)


def reference() -> str:
    """The whole page."""
    lines = [INTRO.rstrip("\n")]
    for name, info in Config.model_fields.items():
        lines += _page_section(f"## `{name}`", _sections(info.annotation)[0], f"{name}.")
    lines += ["", BETWEEN.rstrip("\n")]
    for spec in _sections(BuiltInSpec):
        name = typing.get_args(spec.model_fields["name"].annotation)[0]
        lines += _page_section(
            f"### `{name}`", _sections(spec.model_fields["params"].annotation)[0], "params."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
