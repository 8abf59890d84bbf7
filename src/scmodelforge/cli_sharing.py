"""Commands that hand a model or what it learned to others: cards, the Hub, exports. Each calls one function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

RepositoryArgument = Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.")]
FolderOption = Annotated[Path, typer.Option("--model", help="Model folder.")]


def push(
    model: FolderOption,
    to: Annotated[str, typer.Option("--to", metavar="USER/NAME", help="Repository on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Only for those who may see it.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Branch to write to; default: main.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="What the commit says.")] = None,
) -> None:
    """Put a model folder on the Hugging Face Hub."""
    from scmodelforge.models.hub import push as run

    _quiet_without_terminal()
    commit = run(model, to, private=private, revision=revision, message=message)
    print(f"Pushed: {commit.repo}, commit {commit.sha}\nTo use it: --model {commit.address}")


def pull(
    repo: RepositoryArgument,
    output: Annotated[Path, typer.Option("--output", help="Model folder to write.")],
    revision: Annotated[
        str | None, typer.Option("--revision", help="Commit, tag or branch; default: the newest of main.")
    ] = None,
) -> None:
    """Fetch a model from the Hugging Face Hub and check it."""
    from scmodelforge.models.hub import pull as run

    _quiet_without_terminal()
    commit = run(repo, output, revision)
    print(f"Pulled: {commit.repo}, commit {commit.sha}\nModel folder: {output}")


def card(
    model: FolderOption,
    results: Annotated[Path, typer.Option("--results", help="What 'benchmark --output' wrote.")],
) -> None:
    """Write benchmark results into the card of a model folder."""
    from scmodelforge.models.card import CARD, add_results

    add_results(model, results)
    print(f"Results are in {model / CARD}")


def _quiet_without_terminal() -> None:
    """No progress bars into files and pipes."""
    if not sys.stderr.isatty():
        from scmodelforge.errors import require_extra

        require_extra("huggingface_hub", "hub", "Sharing models on the Hugging Face Hub")
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
