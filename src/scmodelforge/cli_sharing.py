"""Commands that hand a model or what it learned to others: cards, the Hub, exports. Each calls one function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scmodelforge.files import require_data, require_model, require_target

if TYPE_CHECKING:
    from anndata import AnnData

RepositoryArgument = Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="Checkpoint, model folder or hf://USER/NAME@COMMIT.")
]
OutputOption = Annotated[Path, typer.Option("--output", help="The .h5ad file to write.")]
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


def genes(
    model: ModelOption,
    output: OutputOption,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Cells: vectors are mean hidden states; default: the model's input."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Hidden state after this block (0: before); default: last.")
    ] = None,
    max_cells: Annotated[
        int | None, typer.Option("--max-cells", min=1, help="Draw so many; default: all.")
    ] = None,
) -> None:
    """Write one vector per gene as AnnData: genes are rows."""
    require_target(output, ".h5ad")
    require_model(model)
    if data is not None:
        require_data(data)
    from scmodelforge.inference_genes import gene_embeddings

    vectors = gene_embeddings(model, data, layer=layer, max_cells=max_cells)
    _write(vectors, output)
    print(f"{vectors.n_obs:,} genes × {vectors.n_vars:,}: {output}")


def attention(
    model: ModelOption,
    data: Annotated[str, typer.Option("--data", help="Cells with raw counts.")],
    output: OutputOption,
    layers: Annotated[
        list[int] | None, typer.Option("--layer", help="Block, from 1; repeatable; default: the last.")
    ] = None,
    heads: Annotated[
        list[int] | None, typer.Option("--head", help="Head, from 0; repeatable; default: all.")
    ] = None,
    genes: Annotated[
        list[str] | None, typer.Option("--gene", help="Id or symbol; repeatable; default: the most common.")
    ] = None,
    max_genes: Annotated[int, typer.Option("--max-genes", min=1, help="Genes without --gene.")] = 2000,
    max_cells: Annotated[int, typer.Option("--max-cells", min=1, help="Draw so many.")] = 1000,
) -> None:
    """Write how much genes attend to genes, mean over cells, as AnnData: genes × genes."""
    require_target(output, ".h5ad")
    require_model(model)
    require_data(data)
    from scmodelforge.inference_genes import attention as run

    result = run(
        model, data, layers=layers, heads=heads, genes=genes, max_genes=max_genes, max_cells=max_cells
    )
    _write(result, output)
    n_cells = result.uns["scmodelforge"]["attention"]["n_cells"]
    print(f"{result.n_obs:,} × {result.n_vars:,} genes, mean over {n_cells:,} cells: {output}")


def _write(result: AnnData, output: Path) -> None:
    from scmodelforge.files import atomic_path

    with atomic_path(output) as temporary:
        result.write_h5ad(temporary, compression="gzip")


def _quiet_without_terminal() -> None:
    """No progress bars into files and pipes."""
    if not sys.stderr.isatty():
        from scmodelforge.errors import require_extra

        require_extra("huggingface_hub", "hub", "Sharing models on the Hugging Face Hub")
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
