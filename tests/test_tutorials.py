"""The tutorials are run as they are written, in their order, in one folder; what they show is what is said here.

Figures may be others: of shown lines the words must be among those of the real output, in the same line.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.journeys.command import Answer, call, calls_with

ROOT = Path(__file__).parents[1]
PAGES = ("finetune", "integration", "perturbation", "tokenizer", "gpus")  # each after pretrain
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
Shell = Callable[[list[str]], str]


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, title and text of the fenced blocks of a tutorial."""
    return BLOCK.findall((ROOT / f"docs/tutorials/{page}.md").read_text("utf-8"))


def commands(text: str) -> list[list[str]]:
    """The words of each command of a bash block."""
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def said(answer: Answer) -> str:
    assert answer.code == 0, answer.err
    return answer.err + answer.out


def shell(words: list[str]) -> str:
    """Run a command and return what it printed."""
    program, *arguments = words
    if program == "scmodelforge":
        torch.set_num_threads(1)  # scikit-learn sets it back to all cores
        return said(call(*arguments))
    assert program == "torchrun"
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def python(text: str, page: str) -> str:
    """Run a Python block and return what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(text, page, "exec"), {"__name__": page})
    return out.getvalue()


def plain(line: str) -> str:
    """A line without its figures and the width of its columns."""
    return re.sub(r"[\s─━┳┻╇┼]+", " ", re.sub(r"-?\d[\d,]*(\.\d+)?(e-?\d+)?", "0", line)).strip()


def run(page: str, shell: Shell) -> Iterator[tuple[str, str]]:
    """Run a tutorial; yield what it shows and what was really said before."""
    output = ""
    for language, title, text in blocks(page):
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif language == "bash":
            output = "\n".join(shell(words) for words in commands(text))
        elif language == "python":
            output = python(text, page)
        elif language == "text":
            yield text, output


def check(page: str, shell: Shell) -> None:
    for shown, output in run(page, shell):
        real = {plain(line) for line in output.splitlines()}
        wrong = [line for line in shown.splitlines() if line.strip("… ") and plain(line) not in real]
        assert wrong == [], f"docs/tutorials/{page}.md shows what is not said. What is:\n{output}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the first tutorial was followed."""
    folder = tmp_path_factory.mktemp("tutorials")
    (folder / "examples").symlink_to(ROOT / "examples")
    with contextlib.chdir(folder):
        check("pretrain", shell)
        yield folder


@pytest.mark.parametrize("page", PAGES)
def test_the_tutorial_does_what_it_shows(page: str, workshop: Path, request: pytest.FixtureRequest) -> None:
    if page != "tokenizer":
        return check(page, shell)
    (first, *lines) = [
        words for language, _, text in blocks(page) if language == "bash" for words in commands(text)
    ]
    assert first == ["pip", "install", "--no-deps", "./examples/plugin"]
    site = request.getfixturevalue("example_plugin")
    answers = iter(calls_with(site, *(arguments for _, *arguments in lines)))
    return check(page, lambda words: "" if words == first else said(next(answers)))


def test_every_tutorial_is_run() -> None:
    assert {path.stem for path in (ROOT / "docs/tutorials").glob("*.md")} == {"pretrain", *PAGES}
