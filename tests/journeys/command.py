"""The command line, called in this process as a shell would call it: arguments in, exit code and texts out."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from scmodelforge import cli

BASELINES = ["pca", "log_normalized", "untrained", "majority"]  # of a linear probe, by default


@dataclass(frozen=True)
class Answer:
    """What a command left in the shell."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Answer:
    """Run `scmodelforge ARGUMENTS`; an exception that is no `SystemExit` goes on, so that the test fails."""
    out, err = io.StringIO(), io.StringIO()
    ours = logging.getLogger("scmodelforge")
    handlers, level, propagate = list(ours.handlers), ours.level, ours.propagate
    argv = ["scmodelforge", *map(str, arguments)]
    code = 0
    try:
        with (
            redirect_stdout(out),
            redirect_stderr(err),
            warnings.catch_warnings(),
            patch.object(sys, "argv", argv),
        ):
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        ours.handlers, ours.propagate = handlers, propagate
        ours.setLevel(level)
    return Answer(code, out.getvalue(), err.getvalue())


CALLS = """
import json, sys
from tests.journeys.command import call
print(json.dumps([vars(call(*arguments)) for arguments in json.loads(sys.argv[1])]))
"""


def calls_with(site: Path, *commands: list[str]) -> list[Answer]:
    """Run `scmodelforge ARGUMENTS` for each of `commands`, in one process that also sees the packages in `site`."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (site, root / "src", root)))
    finished = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return [Answer(**answer) for answer in json.loads(finished.stdout.splitlines()[-1])]


def done(*arguments: object) -> Answer:
    """Run a command that must succeed."""
    answer = call(*arguments)
    assert answer.code == 0, answer.err
    return answer


def refused(*arguments: object, words: tuple[str, ...]) -> str:
    """Run a command that must end with exit code 2 and one message holding all `words`; returns the message."""
    answer = call(*arguments)
    assert answer.code == 2, answer
    assert answer.out == ""
    assert answer.err.count("Error: ") == 1, answer.err
    message = answer.err.partition("Error: ")[2]
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    return message


def sets(**keys: object) -> list[str]:
    """`--set` options; two underscores stand for the dot."""
    return [part for key, value in keys.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def files_below(folder: Path) -> list[str]:
    """Every file below a folder that may not exist."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def checkpoint(run: Path) -> Path:
    """The best checkpoint of a run."""
    return run / "checkpoints" / "best.ckpt"
