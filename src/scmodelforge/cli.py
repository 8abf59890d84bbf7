"""The command line: one short function per command. Each parses, calls one function of the library, prints.

A mistake in the input ends with one message and exit code 2, never with a traceback.
"""

from __future__ import annotations

import glob
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import scmodelforge
from scmodelforge import cli_sharing
from scmodelforge.cli_imports import importing
from scmodelforge.cli_output import finish_run, print_plan, print_results, set_up_messages
from scmodelforge.errors import UserError
from scmodelforge.files import require_data, require_model, require_target, require_writable

app = typer.Typer(
    name="scmodelforge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="About config files.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")

log = logging.getLogger(__name__)

MODEL_SECTIONS = ("data", "tokenizer", "model")  # compared with those of the model where there is one

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.max_epochs=3."),
]
ModelOption = Annotated[
    Path, typer.Option("--model", help="Checkpoint (.ckpt), model folder or hf://USER/NAME@COMMIT.")
]
DataOption = Annotated[list[Path], typer.Option("--data", help="An .h5ad file with raw counts.")]
OutputOption = Annotated[Path | None, typer.Option("--output", help="The .h5ad file to write.")]
InPlaceOption = Annotated[bool, typer.Option("--in-place", help="Write into the input file instead.")]
DaskOption = Annotated[
    str | None,
    typer.Option("--dask", metavar="ADDRESS", help="Let the workers of this Dask scheduler do it."),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Most cells of a batch.")]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", help="32, bf16 or bf16-true; default: bf16 on a GPU that has it, else 32."),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"scmodelforge {scmodelforge.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Pretrain, fine-tune and evaluate single-cell foundation models."""


@app.command()
def train(
    config: ConfigOption = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Start from this model: checkpoint or model folder.")
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on from this checkpoint.")] = None,
    set_: SetOption = None,
) -> None:
    """Pretrain a model on the cells of a config."""
    from scmodelforge.config_io import load_config

    sections = (*MODEL_SECTIONS, "training", "eval")
    settings = load_config(_needed(config, "train"), set_ or [], sections, require_data=True)
    for model in filter(None, (checkpoint, resume)):
        require_model(model)
    with importing():
        from scmodelforge.training.run import train as run

    again = f"scmodelforge train --config {shlex.quote(str(config))}"
    if checkpoint is not None:
        again += f" --checkpoint {shlex.quote(str(checkpoint))}"
    finish_run(run(settings, resume=resume, checkpoint=checkpoint), again, set_)


@app.command()
def finetune(
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="Pretrained checkpoint or model folder.")],
    config: ConfigOption = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on from this checkpoint.")] = None,
    set_: SetOption = None,
) -> None:
    """Teach a pretrained model the labels of some cells."""
    from scmodelforge.config_io import load_config

    sections = (*MODEL_SECTIONS, "training", "finetune")
    settings = load_config(_needed(config, "finetune"), set_ or [], sections, require_data=True)
    for model in filter(None, (checkpoint, resume)):
        require_model(model)
    with importing():
        from scmodelforge.finetuning.run import finetune as run

    paths = [shlex.quote(str(path)) for path in (config, checkpoint)]
    again = f"scmodelforge finetune --config {paths[0]} --checkpoint {paths[1]}"
    finish_run(run(settings, checkpoint, resume=resume), again, set_)


@app.command()
def plan(config: ConfigOption = None, set_: SetOption = None) -> None:
    """Say what training on the cells of a config will cost, from some real steps; nothing is written."""
    from scmodelforge.config_io import load_config

    sections = (*MODEL_SECTIONS, "training")
    settings = load_config(_needed(config, "plan"), set_ or [], sections, require_data=True)
    with importing():
        from scmodelforge.training.plan import plan as run

    print_plan(run(settings))


@app.command()
def slurm(
    config: ConfigOption = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=0, help="GPUs of each machine; default: training.num_gpus, or 1."),
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option("--cpus", min=1, help="CPU cores of each process; default: loader_threads + 2."),
    ] = None,
    time: Annotated[
        str | None, typer.Option("--time", help="Time limit of one turn, e.g. 12:00:00 or 2-12.")
    ] = None,
    partition: Annotated[str | None, typer.Option("--partition", help="Partition of the cluster.")] = None,
    output: Annotated[Path, typer.Option("--output", help="The script to write.")] = Path("job.sbatch"),
    set_: SetOption = None,
) -> None:
    """Write a batch script for Slurm that trains, saves before its time is up, and goes on in its next turn."""
    from scmodelforge.config_io import load_config

    file = _needed(config, "slurm")
    settings = load_config(file, set_ or [], (*MODEL_SECTIONS, "training"), require_data=True)
    from scmodelforge.files import write_text
    from scmodelforge.training.slurm import slurm_script

    if output.exists():
        raise UserError(f"'{output}' exists already. Choose another name with --output.")
    sizes = {"nodes": nodes, "gpus": gpus, "cpus": cpus, "time": time, "partition": partition}
    script = slurm_script(settings.training, file, overrides=set_ or [], folder=Path.cwd(), **sizes)  # type: ignore[arg-type]
    write_text(output, script)
    if settings.training.checkpoint_every_n_steps is None:
        log.info(
            "A machine that fails loses the epoch under way; training.checkpoint_every_n_steps saves more often."
        )
    print(f"{output} is ready; submit it with: sbatch {output}")


@app.command()
def benchmark(
    model: ModelOption,
    data: DataOption,
    config: ConfigOption = None,
    output: Annotated[Path | None, typer.Option("--output", help="JSON file for the results.")] = None,
    set_: SetOption = None,
) -> None:
    """Compare a model with its baselines on labelled cells."""
    from scmodelforge.config_io import load_config

    settings = load_config(config, set_ or [], (*MODEL_SECTIONS, "eval"))
    require_model(model)
    require_data(_one(data))
    if output is not None:
        require_target(output)
    with importing():
        from scmodelforge.evaluation.harness import evaluate

    print_results(evaluate(settings, model, _one(data), output, command=sys.argv))
    if output is not None:
        from scmodelforge.report.benchmark_page import write_benchmark_report

        print(f"Results: {output}")
        print(f"Report:  {write_benchmark_report(output, model, data[0], settings)}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run of train or finetune.")],
) -> None:
    """Write report.html into a run folder (again): curves, cells, what was dropped, how to repeat it."""
    from scmodelforge.report.run_page import write_report

    print(f"Report: {write_report(run)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders.")],
    output: Annotated[Path, typer.Option("--output", help="The page to write.")] = Path("comparison.html"),
) -> None:
    """Put runs side by side on one page: curves, differences of their configs, figures, benchmarks."""
    from scmodelforge.report.comparison import compare as run

    print(f"Comparison: {run(runs, output)}")


@app.command()
def embed(
    model: ModelOption,
    data: Annotated[
        list[str], typer.Option("--data", help=".h5ad file with raw counts; repeatable, or a quoted pattern.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", help="The .h5ad file to write; the folder, of many files.")
    ] = None,
    in_place: InPlaceOption = False,
    key: Annotated[str, typer.Option("--key", help="Name in obsm.")] = "X_scmodelforge",
    pooling: Annotated[
        str | None, typer.Option("--pooling", help="mean, cls or window; default: the model's.")
    ] = None,
    batch_size: BatchOption = 256,
    precision: PrecisionOption = None,
    dask: DaskOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Write cell embeddings into obsm of a copy of the file, or of the file itself; or of copies of many files."""
    from scmodelforge.config_io import load_config

    settings = load_config(config, set_ or [], MODEL_SECTIONS)
    many = len(data) > 1 or dask is not None or (not Path(data[0]).exists() and glob.has_magic(data[0]))
    if many and (in_place or output is None or output.suffix == ".h5ad"):
        raise UserError("Many files need a folder to write into: --output DIR.")
    if pooling not in (None, "mean", "cls", "window"):
        raise UserError(f"--pooling is '{pooling}'; it must be mean, cls or window.")
    require_model(model)
    how: dict[str, Any] = {
        "key_added": key,
        "batch_size": batch_size,
        "pooling": pooling,
        "precision": precision,
        "config": settings,
    }
    if many:
        with importing():
            from scmodelforge.inference_many import embed_files, files_of

        counts = embed_files(files_of(data), output, model, dask=dask, **how)  # type: ignore[arg-type]
        print(f"{sum(counts.values()):,} cells of {len(counts):,} files embedded: obsm['{key}'] in {output}")
        return
    target = _target(Path(data[0]), output, in_place)
    with importing():
        from scmodelforge.inference_files import embed_file

    n_cells = embed_file(data[0], target, model, **how)
    print(f"{n_cells:,} cells embedded: obsm['{key}'] of {target}")


@app.command()
def annotate(
    model: ModelOption,
    data: DataOption,
    output: OutputOption = None,
    in_place: InPlaceOption = False,
    batch_size: BatchOption = 256,
    precision: PrecisionOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Write the labels that a fine-tuned model predicts into obs."""
    from scmodelforge.config_io import load_config

    file, settings = _one(data), load_config(config, set_ or [], MODEL_SECTIONS)
    require_model(model)
    target = _target(file, output, in_place)
    with importing():
        from scmodelforge.inference_files import annotate_file

    predictions = annotate_file(
        file, target, model, batch_size=batch_size, precision=precision, config=settings
    )
    name = predictions.columns[0]
    if predictions[name].dtype == "category":
        for label, count in predictions[name].value_counts().items():
            if count:
                print(f"{count:>8,}  {label}")
    print(f"{len(predictions):,} cells annotated: obs['{name}'] of {target}")


@app.command()
def perturb(
    model: ModelOption,
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", help="Folder for perturbations.csv and volcano.png.")],
    genes: Annotated[
        str | None, typer.Option("--genes", help="Genes to perturb one at a time: A,B or all (of each cell).")
    ] = None,
    set_of_genes: Annotated[
        str | None, typer.Option("--set-of-genes", help="Genes to perturb together: A,B; in this order.")
    ] = None,
    how: Annotated[str, typer.Option("--how", help="delete or overexpress.")] = "delete",
    state_key: Annotated[str | None, typer.Option("--state-key", help="obs column of the states.")] = None,
    start: Annotated[str | None, typer.Option("--start", help="State of the cells to perturb.")] = None,
    goal: Annotated[str | None, typer.Option("--goal", help="State to measure the shift to.")] = None,
    alt: Annotated[
        list[str] | None, typer.Option("--alt", help="Another state to measure the shift to (repeatable).")
    ] = None,
    null: Annotated[
        str | None, typer.Option("--null", help="Compare with cells of this state, not with random genes.")
    ] = None,
    max_cells: Annotated[int, typer.Option("--max-cells", min=1, help="Most cells to perturb.")] = 1000,
    pooling: Annotated[str | None, typer.Option("--pooling", help="As of embed.")] = None,
    precision: Annotated[str, typer.Option("--precision", help="32, bf16 or bf16-true.")] = "32",
    seed: Annotated[int, typer.Option("--seed", min=0, help="For cells and genes that are drawn.")] = 0,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Delete or overexpress genes in cells and measure how the model's view of them moves."""
    from scmodelforge.config_io import load_config

    settings = load_config(config, set_ or [], MODEL_SECTIONS)
    if (genes is None) == (set_of_genes is None):
        raise UserError("Say what to perturb: either --genes A,B (or all) or --set-of-genes A,B.")
    names = str(genes or set_of_genes)
    require_model(model)
    require_data(_one(data))
    require_writable(output)
    with importing():
        from scmodelforge.perturbation.run import perturb as run
        from scmodelforge.report.volcano import write_perturbations

    table = run(
        _one(data),
        model,
        "all" if names == "all" else names.split(","),
        together=genes is None,
        how=how,
        state_key=state_key,
        start=start,
        goal=goal,
        alt=alt or (),
        null=null,
        max_cells=max_cells,
        pooling=pooling,
        precision=precision,
        seed=seed,
        config=settings.data,
    )
    print(write_perturbations(table, output, how, start, goal))


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="An .h5ad file, a .zarr store, or the URL of one.")],
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Say what is in a file and whether it can be trained on (exit code 2 if not)."""
    from scmodelforge.config_io import load_config

    settings = load_config(config, set_ or [], MODEL_SECTIONS)
    require_data(data)
    from scmodelforge.data.check import check as run

    report = run(data, settings.data, settings.obs_columns)
    print("\n".join(report.lines(settings.tokenizer)))
    if report.problems:
        raise typer.Exit(2)


@app.command()
def tokens(
    data: Annotated[str, typer.Argument(help="An .h5ad file, a .zarr store, or the URL of one.")],
    cell: Annotated[str, typer.Option("--cell", help="Row number or name of the cell.")] = "0",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Tokens to print.")] = 25,
    model: Annotated[Path | None, typer.Option("--model", help="Use this model's tokenizer.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Show what a cell becomes."""
    from scmodelforge.config_io import load_config

    settings = load_config(config, set_ or [], MODEL_SECTIONS)
    require_data(data)
    if model is not None:
        require_model(model)
    with importing():
        from scmodelforge.inference import tokens as run

    table = run(data, cell, model=model, config=settings)
    shown = table.head(rows).to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="")
    print(shown + (f"\n… {len(table):,} tokens in all" if len(table) > rows else ""))


@app.command()
def shard(
    config: ConfigOption = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder for the shards.")] = None,
    obs_columns: Annotated[
        list[str] | None, typer.Option("--obs-column", help="Keep only this obs column (repeatable).")
    ] = None,
    cells_per_shard: Annotated[int, typer.Option("--cells-per-shard", min=1)] = 100_000,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Files side by side.")] = 1,
    dask: DaskOption = None,
    verify: Annotated[Path | None, typer.Option("--verify", help="Check the shards in this folder.")] = None,
    set_: SetOption = None,
) -> None:
    """Convert the files of a config into shards that are mapped into memory, or verify such shards."""
    if verify is not None:
        from scmodelforge.data.shards import verify_shards

        if problems := verify_shards(verify):
            raise UserError("\n".join(problems) + "\nDelete them and start 'scmodelforge shard' again.")
        print(f"All shards in {verify} are whole.")
        return
    from scmodelforge.config_io import load_config

    settings = load_config(_needed(config, "shard"), set_ or [], ("data",), require_data=True)
    if output is None:
        raise UserError("Say where to write: --output DIR.")
    from scmodelforge.data.shard_statistics import write_gene_statistics
    from scmodelforge.data.shards import write_shards
    from scmodelforge.data.sources import sources_of
    from scmodelforge.data.store import vocabulary_of

    vocab = vocabulary_of(settings)
    sources = sources_of(settings.data)
    records = write_shards(
        sources, vocab, settings.data, output, obs_columns, cells_per_shard, processes, dask
    )
    medians = write_gene_statistics(output, vocab, settings.data)
    n_cells, plural = sum(record.n_cells for record in records), "s" * (len(records) != 1)
    print(
        f"{n_cells:,} cells in {len(records):,} shard{plural}: {output}\n"
        f"Train on them with data.paths: ['{output}'], and without measuring them again with "
        f"tokenizer.gene_medians: {medians}"
    )


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="An .h5ad file.")],
    output: Annotated[Path, typer.Option("--output", help="YAML file to write.")] = Path("config.yaml"),
    set_: SetOption = None,
) -> None:
    """Write a commented starter config for a file."""
    require_data(data)
    from scmodelforge.config import DataConfig
    from scmodelforge.config_io import starter_yaml
    from scmodelforge.data.check import check as run
    from scmodelforge.files import write_text

    if output.exists():
        raise UserError(f"'{output}' exists already. Choose another name with --output.")
    report = run(data, DataConfig())
    found = report.suggestions
    write_text(output, starter_yaml(data, found, set_ or []))
    if report.problems:  # does what is suggested solve them?
        report = run(data, DataConfig(layer=found.layer, gene_vocab=found.gene_vocab or "from_data"))
    for problem in report.problems:
        log.warning("These cells cannot be trained on yet: %s", problem)
    print(f"{output} is ready; start with: scmodelforge train --config {output}")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder with the published files.")],
    family: Annotated[str, typer.Option("--from", help="geneformer, scgpt or transcriptformer.")],
    output: Annotated[Path, typer.Option("--output", help="Model folder to write.")],
    dictionaries: Annotated[
        Path | None, typer.Option("--dictionaries", help="Geneformer: folder with its dictionaries.")
    ] = None,
) -> None:
    """Turn published weights into a model folder."""
    from scmodelforge.files import new_folder
    from scmodelforge.genes.tables import known_genes
    from scmodelforge.models.bundle import save_bundle
    from scmodelforge.models.published import import_model

    with new_folder(output) as temporary:
        bundle = import_model(family, folder, dictionaries)
        save_bundle(bundle, temporary, f"Weights imported from {family}: {folder.resolve().name}")
    vocab, model = bundle.vocab, bundle.config.model
    n_known = int(known_genes().index.isin(vocab.gene_ids).sum())
    print(f"{vocab.n_genes:,} genes ({vocab.species}), {n_known:,} of them in the gene tables")
    print(
        f"{bundle.n_parameters:,} parameters: {model.architecture}, {model.num_layers} × {model.hidden_dim}"
    )
    print(f"Model folder: {output}")


@app.command("export")
def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist or be empty.")],
    model: ModelOption,
    to: Annotated[str, typer.Option("--to", help="huggingface-bert, scgpt or transcriptformer.")],
) -> None:
    """Write a model as the authors of its family do."""
    require_model(model)
    from scmodelforge.models.published import export_model

    print(f"Written: {export_model(model, to, folder)}")


for command in (
    cli_sharing.push,
    cli_sharing.pull,
    cli_sharing.card,
    cli_sharing.genes,
    cli_sharing.attention,
):
    app.command()(command)


@app.command()
def strategies() -> None:
    """List which tokenizer, architecture and task fit together, and the presets."""
    from scmodelforge.overview import overview

    print(overview())


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of config files, for editors."""
    import json

    from scmodelforge.config_io import config_schema as schema

    print(json.dumps(schema(), indent=2))


def _needed(config: Path | None, command: str) -> Path:
    if config is None:
        raise UserError(
            f"'{command}' needs a config: --config FILE.\n"
            "'scmodelforge init DATA.h5ad' writes one to start from."
        )
    return config


def _one(data: list[Path]) -> Path:
    """The one file of a command that takes no more; of several the last alone would be read."""
    if len(data) > 1:
        raise UserError(f"--data is given {len(data)} times; this command takes one file at a time.")
    return data[0]


def _target(data: Path, output: Path | None, in_place: bool) -> Path:
    """The file to write, which must be another than the input unless --in-place is said."""
    if in_place == (output is not None):
        raise UserError("Say where to write: either --output FILE.h5ad or --in-place.")
    require_data(data)
    if output is None:
        return data
    if output.exists() and output.samefile(data):
        raise UserError(
            f"--output '{output}' is the input file itself. Give another name, or say --in-place to write into it."
        )
    return require_target(output, ".h5ad")


def main() -> None:
    """Entry point of the `scmodelforge` command."""
    set_up_messages()
    try:
        app()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
