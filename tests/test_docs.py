"""The documentation says what the program does: commands parse, configs load, keys exist, the reference is current."""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from scmodelforge.cli import app
from scmodelforge.config import Config, Section
from scmodelforge.config_io import load_config
from scmodelforge.strategies import TABLE

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CLI = typer.main.get_command(app)


def commands() -> Iterator[tuple[str, str]]:
    """Page and text of every `scmodelforge …` line in a fenced block; a line that ends in \\ goes on."""
    for page in PAGES:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(\$ )?scmodelforge [a-z]", line):
                    yield str(page.relative_to(ROOT / "docs")), line.removeprefix("$ ")


def keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys and sections below a section."""
    for name, info in section.model_fields.items():
        yield prefix + name
        for kind in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from keys(kind, f"{prefix}{name}.")


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_commands_parse(page: str, line: str) -> None:
    name, *arguments = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    command, context = CLI, typer.Context(CLI)
    while hasattr(command, "commands"):
        assert name in command.commands, f"{page}: there is no command {name!r}"
        command = command.commands[name]
        if hasattr(command, "commands"):
            name, *arguments = arguments
    command.make_context(name, arguments, parent=context)  # parses; runs nothing
    for override in [value for name, value in itertools.pairwise(arguments) if name == "--set"]:
        key = override.partition("=")[0].partition(".params.")[0]  # what is below is the plugin's
        assert key in set(keys(Config)), f"{page}: no key {override!r}"


def test_every_command_has_its_page_and_is_shown_there() -> None:
    names = {name: [name] for name in CLI.commands}  # type: ignore[attr-defined]
    names["config-schema"] = [*names.pop("config"), "schema"]
    assert {page.stem for page in PAGES if page.parent.name == "commands"} == set(names)
    for page, words in names.items():
        lines = [
            shlex.split(line, comments=True) for where, line in commands() if where == f"commands/{page}.md"
        ]
        assert any(line[1 : 1 + len(words)] == words for line in lines), (
            f"docs/commands/{page}.md does not show it"
        )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_load(path: Path) -> None:
    assert load_config(path).model_fields_set


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_keys_in_the_text_exist(page: Path) -> None:
    known = set(keys(Config))
    sections = "|".join(Config.model_fields)
    named = re.findall(rf"`((?:{sections})\.[a-z0-9_.]+)[`:]", page.read_text(encoding="utf-8"))
    assert [key for key in named if key not in known | {"model.safetensors"}] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_yaml_in_the_text_loads(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(
        re.findall(r"^```yaml[^\n]*\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    ):
        example = tmp_path / f"{number}.yaml"
        example.write_text(text, encoding="utf-8")
        load_config(example)


def test_the_reference_is_current() -> None:
    printed = runpy.run_path(str(ROOT / "scripts/build_config_reference.py"))["reference"]()
    assert printed == (ROOT / "docs/config.md").read_text(encoding="utf-8"), (
        "docs/config.md is not what the config tree says: run python scripts/build_config_reference.py"
    )


def test_links_between_pages_work() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name} links to {target}"


def test_the_table_of_what_fits_together_is_that_of_the_code() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| (.*) \|$", (ROOT / "docs/models.md").read_text("utf-8"), re.M
    )
    written = {
        (tokenizer, architecture): set(re.findall(r"`(\w+)`", tasks))
        for tokenizer, architecture, tasks in rows
    }
    assert written == {
        (tokenizer, architecture): {
            row.task
            for row in TABLE.values()
            if row.allowed and (row.tokenizer, row.architecture) == (tokenizer, architecture)
        }
        for tokenizer, architecture, _ in TABLE
    }


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    """Links, anchors, the navigation and included files are checked by mkdocs, whose warnings are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tutorials/pretrain/index.html").is_file()
