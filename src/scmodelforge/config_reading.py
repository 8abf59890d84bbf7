"""One reading of a config: where every key was written, and all that is wrong with it.

Nothing stops at the first mistake. What is found in the YAML, in the overrides and on the disk is
collected and raised as one `ConfigError`, each problem with its line. Lines come from YAML's own nodes,
rules from the pydantic tree in `config`; pydantic's words are put into plain ones here.
"""

from __future__ import annotations

import difflib
import functools
import glob
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from scmodelforge.config import Config, Section
from scmodelforge.errors import ConfigError
from scmodelforge.manifest import shards_or_problem

Loc = tuple[str | int, ...]

# Values of these keys that are names; anything else is the path of a file.
_NAMES = {
    ("data", "gene_vocab"): ("human_protein_coding", "mouse_protein_coding", "from_data"),
    ("data", "extend_vocab"): ("mean",),
    ("tokenizer", "gene_medians"): ("from_data", "none"),
    ("model", "gene_embeddings"): (),
}

# pydantic's error types in plain words; what the user wrote is appended.
_PLAIN = {
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "too_short": "must have at least {min_length} values",
    "too_long": "must have at most {max_length} values",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "name must be one of {expected_tags}",
    "union_tag_not_found": "needs a key 'name' that says what it is",
    "model_type": "must be a section, that is keys and values indented below it",
    "model_attributes_type": "must be a section, that is keys and values indented below it",
}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which dates stay text, so that a run may be called 2026-01-31."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass
class Reading:
    """One reading of a config: where each key was written, and all that is wrong so far."""

    name: str
    node: yaml.Node | None = None
    overridden: list[Loc] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def parse(self, text: str) -> dict[Any, Any]:
        """Return the mapping that the YAML text holds; keep its nodes for line numbers."""
        try:
            loader = _Loader(text)
            self.node = loader.get_single_node()
            if self.node is not None:
                self._check_keys(self.node, (), set())
            data = loader.construct_document(self.node) if self.node is not None else None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise self._syntax_error(text, mark.line if mark else 0, str(error.problem)) from error
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position)
            raise self._syntax_error(text, line, "a control character that no text holds") from error
        except _ESCAPED as error:
            raise ConfigError(f"{self.name}: holds a value that YAML cannot read ({error}).") from error
        if data is None:
            raise ConfigError(
                f"{self.name}: the file is empty. Its sections can be: {', '.join(Config.model_fields)}."
            )
        if not isinstance(data, dict):
            raise ConfigError(
                f"{self.name}:1: expected sections such as 'data:' with keys below them, not {show(data)}."
            )
        return data

    def _syntax_error(self, text: str, line: int, problem: str) -> ConfigError:
        lines = text.splitlines() or [""]
        shown = lines[min(line, len(lines) - 1)]
        if "\t" in shown[: len(shown) - len(shown.lstrip())] or "'\\t'" in problem:
            problem = "a tab; YAML is indented with spaces"
        elif problem.startswith("mapping values are not allowed"):
            problem = "a colon where none can be; check the indentation, and quote text that holds a colon"
        elif problem == "but found another document":
            problem = "a second document ('---'); a config is one document"
        return ConfigError(f"{self.name}:{line + 1}: this is not valid YAML: {problem}.\n    {shown.strip()}")

    def _check_keys(self, node: yaml.Node, loc: Loc, seen: set[int]) -> None:
        """Read keys as text and collect duplicates, of which YAML itself would silently keep the last."""
        if id(node) in seen:  # an alias
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._check_keys(item, (*loc, index), seen)
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.tag != "tag:yaml.org,2002:merge":
                        key.tag = "tag:yaml.org,2002:str"  # so that 1 and yes are unknown keys like others
                    line = key.start_mark.line + 1
                    if key.value in lines:
                        text = f"is written twice, first in line {lines[key.value]}"
                        name = dotted((*loc, key.value))
                        self.problems.append((line, f"{self.name}:{line}: {name}: {text}"))
                    lines.setdefault(key.value, line)
                    self._check_keys(value, (*loc, key.value), seen)

    def override(self, data: dict[Any, Any], override: str) -> dict[Any, Any]:
        """Return `data` with one `key=value` applied."""
        key, equals, text = override.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            self._problem_of_override(override, "expected KEY=VALUE, such as training.max_epochs=3")
            return data
        loc: Loc = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
        try:
            value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        except (yaml.YAMLError, *_ESCAPED):
            self._problem_of_override(key, f"the value {show(text)} is not valid YAML; quote it")
            return data
        try:
            data = _with(data, loc, value)
        except LookupError as error:
            self._problem_of_override(key, str(error.args[0]))
        else:
            self.overridden.append(loc)
        return data

    def _problem_of_override(self, key: str, text: str) -> None:
        self.problems.append((_AFTER_ALL_LINES, f"--set {key}: {text.removeprefix(f'{key}: ')}"))

    def validate(self, data: dict[Any, Any]) -> tuple[Config | None, set[Loc]]:
        """Collect every problem; also return the config with what was wrong left out.

        pydantic checks a section as a whole only when its fields are right, so what is wrong is left
        out and the rest is looked at again, until it is valid.
        """
        dropped: set[Loc] = set()
        while True:
            try:
                return Config.model_validate(data), dropped
            except ValidationError as error:
                wrong = set()
                for detail in error.errors(include_url=False):
                    loc = _without_tags(detail["loc"], data)
                    self._problem_of_pydantic(detail, loc, dropped)
                    keep = next((i for i, part in enumerate(loc) if isinstance(part, int)), len(loc))
                    wrong.add(
                        loc[: keep - 1] if detail["type"] == "missing" and keep == len(loc) else loc[:keep]
                    )
                if () in wrong or wrong <= dropped:  # a default that is wrong stays so, left out or not
                    return None, dropped
                for loc in wrong:
                    data = _with(data, loc, _GONE)
                dropped |= wrong

    def _problem_of_pydantic(self, detail: ErrorDetails, loc: Loc, dropped: set[Loc]) -> None:
        kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
        place = loc
        if kind == "value_error":
            text = str(context["error"])
            if not loc:  # a rule across sections
                keys = _keys_in(text)
                if not any(key[: len(bad)] == bad for key in keys for bad in dropped):
                    self.problem(self._written_one(keys), text)
                return
            named = set(re.findall(r"\w+", text))
            if any(bad[:-1] == loc and bad[-1] in named for bad in dropped):
                return  # follows from a problem that is listed already
            fields = [key for key in value if key in named] if isinstance(value, dict) else []
            if fields:  # the rule of a section: point at a key that it names
                place = (*loc, next((f for f in fields if (*loc, f) in self.overridden), fields[0]))
        elif kind == "extra_forbidden":
            text = _unknown(loc)
        elif kind == "missing":
            text = "is required"
        elif kind in _PLAIN:
            text = _PLAIN[kind].format(**context)
            if kind != "union_tag_not_found":
                text += f", not {show(context.get('tag', value))}"
            if kind in ("union_tag_invalid", "literal_error"):
                names = re.findall(r"'([^']*)'", str(context.get("expected_tags", context.get("expected"))))
                near = difflib.get_close_matches(str(context.get("tag", value)), names, n=1)
                text += f"; did you mean {near[0]}?" if near else ""
            if kind in ("list_type", "tuple_type") and not isinstance(value, dict | None):
                text += f"; write [{value}]"
            if kind == "string_type" and value is not None:
                text += "; put it in quotes"
        else:
            text = detail["msg"][:1].lower() + detail["msg"][1:]
        self.problem(place, f"{dotted(loc)}: {text}" if loc else text)

    def _written_one(self, keys: list[Loc]) -> Loc:
        """The first key that an override wrote, else the first that the file has, else none."""
        in_file = (key for key in keys if _line_of(self.node, key)[1] == len(key))
        return next((key for key in keys if key in self.overridden), None) or next(in_file, ())

    def resolve_paths(self, config: Config, dropped: set[Loc]) -> Config:
        """Expand paths and collect what does not exist, except under keys that were wrong anyway."""
        expanded: dict[Loc, Any] = {}
        if config.data.source == "local" and not dropped & {("data",), ("data", "paths"), ("data", "source")}:
            expanded["data", "paths"] = self._expand(config.data.paths)
        for loc, names in _NAMES.items():
            value = getattr(getattr(config, str(loc[0])), str(loc[1]))
            if value is None or value in names or dropped & {loc[:1], loc}:
                continue
            expanded[loc] = os.path.expanduser(value)
            if not os.path.isfile(expanded[loc]):
                near = difflib.get_close_matches(value.lower(), names, n=1)
                hint = f"; names are {', '.join(names)}" if names else ""
                hint = f"; did you mean {near[0]}?" if near else hint
                self.problem(loc, f"{dotted(loc)}: there is no file '{value}'{hint}")
        for (section, key), value in expanded.items():  # model_copy keeps the set of keys that the user wrote
            changed = getattr(config, str(section)).model_copy(update={str(key): value})
            config = config.model_copy(update={str(section): changed})
        return config

    def _expand(self, paths: list[str]) -> list[str]:
        loc: Loc = ("data", "paths")
        if not paths:
            self.problem(loc, "data.paths: at least one .h5ad file is required")
        found: list[str] = []
        seen: set[str] = set()
        for index, path in enumerate(paths):
            if "://" in path:
                found.append(path)
                if "*" in path:
                    self.problem(
                        (*loc, index), f"data.paths: '{path}' is a pattern; list the URLs one by one"
                    )
                elif path in seen:
                    self.problem(
                        (*loc, index), f"data.paths: '{path}' is listed twice, so its cells would count twice"
                    )
                seen.add(path)
                continue
            name = os.path.expanduser(path)
            matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
            text = None
            if os.path.isdir(name) and not _is_zarr(name):
                matches, text = shards_or_problem(name)
            elif not matches:
                pattern = glob.has_magic(name)
                text = (
                    f"the pattern '{path}' matches no file"
                    if pattern
                    else f"the file '{path}' does not exist"
                )
            if text is None and (twice := [match for match in matches if os.path.realpath(match) in seen]):
                text = f"'{twice[0]}' is listed twice, so its cells would count twice"
            if text:
                known = os.path.isabs(name) or matches or os.path.isdir(name)
                where = "" if known else f" (working folder: {os.getcwd()})"
                self.problem((*loc, index), f"data.paths: {text}{where}")
            found += matches
            seen.update(map(os.path.realpath, matches))
        return found

    def problem(self, loc: Loc, text: str) -> None:
        """Note a problem of the key at `loc`, with the line or the override that wrote it."""
        line, depth = _line_of(self.node, loc)
        latest = self.overridden[::-1]
        wrote_it = [key for key in latest if loc[: len(key)] == key]
        if depth < len(loc):  # not in the file
            wrote_it += [key for key in latest if key[: len(loc)] == loc]
        parent = loc[:-1]
        made_its_section = [key for key in latest if 1 < len(parent) > depth and key[: len(parent)] == parent]
        if guilty := wrote_it or made_its_section:
            self._problem_of_override(dotted(guilty[0]), text)
            return
        place = f"{self.name}:{line}" if line and depth else self.name
        self.problems.append((line, f"{place}: {text}"))

    def raise_if_wrong(self) -> None:
        """Raise one `ConfigError` with all problems, in the order of the file."""
        if self.problems:
            texts = list(dict.fromkeys(text for _, text in sorted(self.problems, key=lambda item: item[0])))
            count = "1 problem" if len(texts) == 1 else f"{len(texts)} problems"
            raise ConfigError(f"The config has {count}:\n" + "\n".join(f"  {text}" for text in texts))


_AFTER_ALL_LINES = 2**62
# What PyYAML lets escape for malformed tagged scalars ("!!bool abc") and endless nesting.
_ESCAPED = (ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
_GONE = object()


def _with(data: Any, loc: Loc, value: Any) -> Any:
    """Return a copy of `data` with `value` at `loc` (`_GONE`: without it); missing sections are made.

    Only what lies on the way is copied, so that two aliases of one YAML anchor stay apart.
    """
    if not loc:
        return value
    head, rest = loc[0], loc[1:]
    if isinstance(head, int):
        if not isinstance(data, list) or head >= len(data):
            raise LookupError(
                f"the config holds no list with an item {head} here; write the list in the file"
            )
        return [*data[:head], _with(data[head], rest, value), *data[head + 1 :]]
    copy = dict(data) if isinstance(data, Mapping) else {}
    copy[head] = _with(copy.get(head), rest, value)
    return {key: item for key, item in copy.items() if item is not _GONE}


def _is_zarr(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("zarr.json", ".zgroup"))


def _without_tags(loc: Loc, data: Any) -> Loc:
    """Take out of pydantic's location the names of union members, which are no keys of the file."""
    loc = tuple(part for part in loc if part not in ("(built-in)", "(plugin)"))  # of benchmarks
    real: list[str | int] = []
    for position, part in enumerate(loc):
        if isinstance(data, dict) and part not in data:
            if position < len(loc) - 1 or data.get("name") == part:
                continue
            data = None
        elif isinstance(data, list) and isinstance(part, int):
            data = next(iter(data[part : part + 1]), None)  # None: a tuple that is too short
        else:
            data = data[part] if isinstance(data, dict) else None
        real.append(part)
    return tuple(real)


def _line_of(node: yaml.Node | None, loc: Loc) -> tuple[int, int]:
    """Return the line of the deepest key of `loc` that is written, and how deep that is."""
    line = 0
    for depth, part in enumerate(loc):
        found: list[tuple[yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            found = [(item, item) for item in node.value[part : part + 1]]
        if not found:
            return line, depth
        key, node = found[-1]  # merged keys come first, own keys last
        line = key.start_mark.line + 1
    return line, len(loc)


def _keys_in(text: str) -> list[Loc]:
    """The dotted keys that a sentence names."""
    return [tuple(key.split(".")) for key in re.findall(r"\b[a-z]+(?:\.[a-z_]+)+", text)]


def _unknown(loc: Loc) -> str:
    """Say that a key is unknown, and what was probably meant."""
    key = dotted(loc)
    last = str(loc[-1])
    likeness = {known: _ratio(last, known.rpartition(".")[2]) for known in _known_keys()}
    near = {known: ratio + 0.5 * _ratio(key, known) for known, ratio in likeness.items() if ratio >= 0.6}
    if near:
        index = next((str(part) for part in loc if isinstance(part, int)), "0")
        return f"is unknown; did you mean {max(near, key=near.__getitem__).replace('*', index)}?"
    parent = re.sub(r"\.\d+\.", ".*.", key).rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    here = [known.removeprefix(prefix) for known in _known_keys() if known.startswith(prefix)]
    return f"is unknown; known here: {', '.join(dict.fromkeys(k for k in here if '.' not in k)) or 'nothing'}"


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


@functools.cache
def _known_keys() -> tuple[str, ...]:
    """Every dotted key of the tree; `*` stands for a place in a list."""

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        for name, info in section.model_fields.items():
            yield prefix + name
            below = f"{prefix}{name}.*." if typing.get_origin(info.annotation) is list else f"{prefix}{name}."
            for inner in _sections_in(info.annotation):
                yield from walk(inner, below)

    return tuple(dict.fromkeys(walk(Config, "")))


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))


def plain_value(value: Any) -> str:
    """Return a value as YAML has it: text without quotes, null, true."""
    return value if isinstance(value, str) else show(value)


def show(value: Any) -> str:
    """Return a value as a user would write it, shortened."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
