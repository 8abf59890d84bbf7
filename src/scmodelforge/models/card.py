"""The model card: what a model is, what it learned from and how it did, written from what was measured.

It is Markdown with a YAML head as the Hugging Face Hub reads it (https://huggingface.co/docs/hub/model-cards; the
sections follow Mitchell et al. 2019, "Model cards for model reporting"). What nobody measured is said to be unknown,
and the license is left to whoever owns the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scmodelforge.config_plugins import plugins_of
from scmodelforge.errors import ModelError
from scmodelforge.files import write_text

if TYPE_CHECKING:
    from scmodelforge.models.bundle import ModelBundle

CARD = "model_card.md"
LICENSE_HINT = (
    "# license: not given yet. Write its name without the '#', for example  license: cc-by-4.0\n"
    "# (names: https://huggingface.co/docs/hub/repositories-licenses)\n"
)
BENCHMARKS, AFTER_BENCHMARKS = "## Benchmarks", "\n## Intended use"


def model_card(bundle: ModelBundle, notes: str = "", run: Mapping[str, Any] | None = None) -> str:
    """The card of a model, as Markdown with a YAML head.

    Parameters
    ----------
    notes
        A paragraph of its own, such as where the weights came from.
    run
        The record of the run that trained it, as in run.json; None: it is not known.
    """
    config = bundle.config
    head = {
        "library_name": "scmodelforge",
        "tags": [
            "biology",
            "single-cell",
            "scRNA-seq",
            f"species:{bundle.vocab.species}",
            config.tokenizer.strategy,
            config.model.architecture,
            config.model.pretraining_task,
        ],
    }
    sections = [
        f"# {config.model.architecture}, {bundle.n_parameters:,} parameters",
        "A single-cell foundation model made with scModelForge" + _purpose(bundle),
        *([notes] if notes else []),
        "## Data\n\n" + _bullets(_data(bundle, run or {})),
        "## Model\n\n" + _bullets(_model(bundle)),
        "## Training\n\n" + _bullets(_training(bundle, run or {})),
        f"{BENCHMARKS}\n\nNone is recorded here: whether this model beats PCA on your task is not known. `scmodelforge "
        "benchmark` measures it, and `scmodelforge card` writes the results here.",
        "## Intended use\n\n" + _use(bundle),
        "## Limits\n\n" + _bullets(_limits(bundle)),
        "## License\n\nThe one in the head of this file. If there is none, none has been given. Weights that were made "
        "from published ones stay bound to the license of those.",
    ]
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{text}{LICENSE_HINT}---\n\n" + "\n\n".join(sections) + "\n"


def add_results(card: str | Path, results: Mapping[str, Any] | str | Path) -> None:
    """Write benchmark results into a model card, in the place of those that it has.

    Parameters
    ----------
    card
        A model card, or the model folder that holds it.
    results
        What `benchmark --output` wrote: the file, or what is in it.

    Raises
    ------
    ModelError
        If the card or the results cannot be read, or the card has no section for them.
    """
    path = Path(card)
    path = path / CARD if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"The model card '{path}' cannot be read: {error}") from error
    before, found, rest = text.partition(f"\n{BENCHMARKS}\n")
    _, end, after = rest.partition(AFTER_BENCHMARKS)
    if not found or not end:
        raise ModelError(
            f"'{path}' has no sections '{BENCHMARKS}' and '{AFTER_BENCHMARKS.strip()}' between which results are "
            "written. Put these two headings in, or write a new card with scmodelforge.save_bundle."
        )
    tables = "\n\n".join(_tables(read_results(results)))
    write_text(path, f"{before}\n{BENCHMARKS}\n\n{tables}\n{AFTER_BENCHMARKS}{after}")


# --- sections -------------------------------------------------------------------------------------


def _bullets(lines: Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _purpose(bundle: ModelBundle) -> str:
    if bundle.labels is None:
        return ": it turns the raw counts of a cell into an embedding."
    return f", fine-tuned: it turns the raw counts of a cell into an embedding and predicts `{bundle.labels.key}`."


def _data(bundle: ModelBundle, run: Mapping[str, Any]) -> Iterator[str]:
    data, facts, vocab = bundle.config.data, run.get("data", {}), bundle.vocab
    names = data.census or ", ".join(Path(path).name for path in data.paths)
    yield f"Cells: {names or 'in memory, or not named'}"
    if facts:
        how = f"by {data.split.group_key}" if data.split.group_key else "by cell"
        yield (
            f"{facts['n_cells']:,} cells; {facts['n_train']:,} trained and {facts['n_val']:,} validated, split {how} "
            f"(seed {run['seed']})"
        )
        if "genes_matched" in facts:
            yield (
                f"{facts['genes_matched']:.1%} of their genes are in the vocabulary, "
                f"and {facts['vocabulary_measured']:.1%} of the vocabulary was measured in them"
            )
    else:
        yield "How many cells, and which of them validated: not recorded"
    if bundle.labels is not None:
        yield "These are the cells of the fine-tuning; for those of the pretraining see the model that it started from"
    yield f"Genes: {vocab.n_genes:,} ({vocab.name}, species {vocab.species}), fingerprint {vocab.fingerprint[:16]}"


def _model(bundle: ModelBundle) -> Iterator[str]:
    config = bundle.config
    model = config.model
    yield (
        f"{model.architecture}: {model.num_layers} layers × {model.hidden_dim}, {model.num_heads} heads, "
        f"feed-forward {model.feed_forward_dim:,}; {bundle.n_parameters:,} parameters"
    )
    yield f"Tokens: {config.tokenizer.strategy}, at most {config.tokenizer.max_genes:,} per cell"
    yield f"Pretraining task: {model.pretraining_task}"
    for key, plugin in plugins_of(config).items():
        yield f"Needs {plugin} ({key} {plugin.name})"
    yield f"Cell embedding: {model.hidden_dim} numbers, pooling {model.pooling}"
    if bundle.labels is not None:
        yield f"Predicts: {bundle.labels.key} ({bundle.labels.task})"
        if bundle.labels.classes:
            yield f"Classes: {', '.join(bundle.labels.classes)}"


def _training(bundle: ModelBundle, run: Mapping[str, Any]) -> Iterator[str]:
    if not run:
        yield "Not recorded: this folder was not written by a training run of scModelForge"
        return
    training = bundle.config.training
    if "steps" in run:
        yield f"{run['steps']:,} optimizer steps in {run['epochs']:,} epochs"
    optimizer = training.optimizer
    yield f"Optimizer {optimizer.name}, learning rate {optimizer.lr:g}, precision {training.precision}"
    if best := run.get("best"):
        yield f"This is the best model of the run: {best['monitor']} {best['value']:.4g}"
    if losses := [f"{name} {value:.4g}" for name, value in run.get("metrics", {}).items() if "loss" in name]:
        yield f"At the end of the run: {', '.join(losses)}"
    if speed := run.get("performance"):
        yield (
            f"{speed['cells_per_second']:,.0f} cells/s, {speed['tokens_per_second']:,.0f} tokens/s, "
            f"peak memory {speed['peak_memory_gib']:.2f} GiB"
        )
    hardware = run["hardware"]
    gpus = ", ".join(hardware["gpus"])
    yield f"Hardware: {gpus or 'no GPU'}, CPU threads: {hardware['cpu_threads']} ({hardware['platform']})"
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in run["versions"].items())


def _use(bundle: ModelBundle) -> str:
    command = "embed" if bundle.labels is None else "annotate"
    what = "Embeddings of cells for clustering, mapping and as input of other models"
    if bundle.labels is not None:
        what += f", and predictions of `{bundle.labels.key}` for cells like those it was fine-tuned on"
    return (
        f"{what}; in research. Input is raw counts (whole numbers) with Ensembl ids or gene symbols.\n\n"
        f"```\nscmodelforge {command} --model FOLDER --data cells.h5ad --output out.h5ad\n```"
    )


def _limits(bundle: ModelBundle) -> Iterator[str]:
    vocab, limit = bundle.vocab, bundle.config.tokenizer.max_genes
    yield f"It knows {vocab.n_genes:,} genes of {vocab.species}; what a cell expresses beyond them it does not see."
    yield f"It reads at most {limit:,} tokens of a cell; of longer cells the rest is left out."
    yield "Normalized or log-transformed counts are not what it was trained on."
    yield (
        "Tissues, diseases, assays and ages that its training cells did not hold are outside of what it learned, and "
        "it does not say so by itself. Differences between donors or batches may remain in the embedding."
    )
    if bundle.labels is not None and bundle.labels.classes:
        n_classes = len(bundle.labels.classes)
        yield (
            f"It answers with one of its {n_classes} classes for every cell, also for cells that belong to none of "
            "them, and the probabilities are not calibrated."
        )
    yield "It is not for diagnosis or any other clinical decision."


# --- benchmark results ----------------------------------------------------------------------------


def read_results(results: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """What `benchmark --output` wrote, from its file or itself; raises `ModelError` if it is nothing like it."""
    if isinstance(results, Mapping):
        return results
    try:
        read = json.loads(Path(results).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"The benchmark results '{results}' cannot be read: {error}") from error
    if not isinstance(read, dict) or not read.get("results"):
        raise ModelError(
            f"'{results}' holds no benchmark results; 'scmodelforge benchmark --output FILE' writes them."
        )
    return read


def _tables(results: Mapping[str, Any]) -> Iterator[str]:
    """A table for each benchmark on each data set, then what has to be said about them."""
    rows = results["results"]
    for name, dataset in dict.fromkeys((row["benchmark"], row["dataset"]) for row in rows):
        group = [row for row in rows if (row["benchmark"], row["dataset"]) == (name, dataset)]
        figures = list(dict.fromkeys(key for row in group for key in row["metrics"] if _is_figure(row, key)))
        lines = (
            ["method", *figures],
            ["---", *("---:" for _ in figures)],
            *(_row(row, figures) for row in group),
        )
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        facts = {key: value for key, value in group[0]["metrics"].items() if not isinstance(value, float)}
        caption = "; ".join(f"{key} {value}" for key, value in facts.items())
        yield f"**{name}** on {dataset}{f' ({caption})' if caption else ''}\n\n{table}"
    if any(row.get("intervals") for row in rows):
        yield "In brackets: 95 % bootstrap intervals."
    yield from map(_comparison, (row for row in rows if row.get("comparison")))
    on = [f"{results['n_cells']:,} cells"] if "n_cells" in results else []
    on += [f"{package} {version}" for package, version in results.get("versions", {}).items()]
    if on:
        yield f"Measured with {', '.join(on)}."
    if seen := results.get("seen_cells"):
        yield f"{seen['n']:,} of these cells ({seen['share']:.1%}) were seen in pretraining."
    if notes := results.get("notes"):
        yield "\n".join(f"- {note}" for note in notes)


def _is_figure(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row["metrics"][key], float) and not key.endswith("_std")


def _row(row: Mapping[str, Any], figures: list[str]) -> list[str]:
    """The cells of one method; a figure that it has not is left empty."""
    cells = [row["method"] + (" (baseline)" if row.get("is_baseline") else "")]
    for key in figures:
        value, interval = row["metrics"].get(key), row.get("intervals", {}).get(key)
        spread = row["metrics"].get(f"{key}_std")
        text = "" if value is None else f"{value:.3f}"
        if interval is not None:
            text += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        elif spread is not None:
            text += f" ± {spread:.3f}"
        cells.append(text)
    return cells


def _comparison(row: Mapping[str, Any]) -> str:
    found = row["comparison"]
    low, high = found["interval"]
    return (
        f"{row['benchmark']} on {row['dataset']}: {row['method']} against the best baseline ({found['baseline']}): "
        f"{found['metric']} {found['difference']:+.3f} [{low:.3f}, {high:.3f}], p = {found['p_value']:.2g}."
    )
