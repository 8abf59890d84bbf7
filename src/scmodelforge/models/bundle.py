"""`ModelBundle`: all that is needed to use a model, as a folder or inside a checkpoint.

A folder holds config.yaml, model.safetensors, genes.parquet, labels.json (fine-tuned models),
training_cells.safetensors (hashes of the cells it was trained on, where they are known) and model_card.md. A checkpoint
(.ckpt) holds the same as plain types beside the state of the optimizer. Neither is ever unpickled: checkpoints are read
with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from scmodelforge import registry
from scmodelforge.config import Config
from scmodelforge.config_io import differences, load_config, to_yaml
from scmodelforge.config_plugins import plugin_records, require_plugins
from scmodelforge.data.training_cells import TrainingCells
from scmodelforge.errors import ModelError, UserError
from scmodelforge.files import atomic_path, ensure_writable, require_model, write_text
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models import hub
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.card import CARD, model_card
from scmodelforge.models.heads import PredictionHead
from scmodelforge.models.published import LOOKS, family_of

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "scmodelforge"
FORMAT_VERSION = 1
TRAINING_CELLS = "training_cells"
LORA = ".lora_"  # in the names of an adapter's weights
ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class Labels:
    """What a fine-tuned model predicts.

    Attributes
    ----------
    key
        obs column it was trained on.
    task
        "classification" or "regression".
    classes
        Names of the classes in the order of the outputs; empty for regression.
    mean, std
        Of the training labels, for regression: the model predicts (label - mean) / std.
    """

    key: str
    task: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def n_outputs(self) -> int:
        """Width of the prediction head."""
        return len(self.classes) if self.task == "classification" else 1


@dataclass(frozen=True)
class ModelBundle:
    """A model with what it needs: config, vocabulary and, if fine-tuned, head and labels.

    `source` is the path or address it was loaded from; None: it was made in memory. `trained_on` has an entry for each
    training whose cells are known by hash.
    """

    config: Config
    vocab: GeneVocab
    model: CellTransformer
    labels: Labels | None = None
    head: PredictionHead | None = None
    source: str | None = None
    trained_on: tuple[TrainingCells, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as plain types, for a checkpoint."""
        return {
            "format_version": FORMAT_VERSION,
            "config": self.config.model_dump(mode="json"),
            "plugins": plugin_records(self.config),
            "vocab": self.vocab.to_plain(),
            "labels": None
            if self.labels is None
            else {**asdict(self.labels), "classes": list(self.labels.classes)},
            TRAINING_CELLS: [cells.to_plain() for cells in self.trained_on],
        }

    @property
    def n_parameters(self) -> int:
        """Parameters of the model and its head, without adapters: these end up in the weights they adapt."""
        parts = (self.model,) if self.head is None else (self.model, self.head)
        named = (pair for part in parts for pair in part.named_parameters())
        return sum(parameter.numel() for name, parameter in named if LORA not in name)

    def sha256(self) -> str:
        """Of all that decides over its results: weights, vocabulary, labels, and how cells become tokens."""
        description = self.describe()
        config = {name: description["config"][name] for name in ("tokenizer", "model")}
        config |= {"preprocessing": description["config"]["data"]["preprocessing"]}
        digest = hashlib.sha256(json.dumps([config, self.vocab.fingerprint, description["labels"]]).encode())
        for module in (self.model, self.head):
            for name, tensor in () if module is None else module.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def build_model(config: Config, vocab: GeneVocab, seed: int | None = None) -> CellTransformer:
    """A freshly initialised model; `seed` fixes its weights and leaves the global generator alone."""
    architecture = registry.ARCHITECTURES.load(config.model.architecture)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return architecture(config, vocab)


def build_head(config: Config, labels: Labels, seed: int | None = None) -> PredictionHead:
    """A freshly initialised prediction head for `labels`."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return PredictionHead(config.model.hidden_dim, labels.n_outputs, config.finetune.head.dropout)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours with `weights_only=True`.

    Raises
    ------
    ModelError
        If the file is missing, damaged, holds objects that are not plain, or is not ours.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelError(f"'{path}' is a folder, and a checkpoint file (.ckpt) is needed here.")
    require_model(path)
    try:
        if path.stat().st_size == 0:
            raise EOFError
        with open(path, "rb") as handle:
            if handle.read(len(ZIP_MAGIC)) != ZIP_MAGIC:  # torch would try an older format, with any error
                raise pickle.UnpicklingError("not written by torch.save")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"'{path}' is not a checkpoint of scModelForge: it is no torch file, or holds objects other than "
            "tensors and plain values, which are never loaded because they could run code."
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise ModelError(
            f"The checkpoint '{path}' cannot be read: it is damaged or was cut off while it was copied "
            f"({path.stat().st_size:,} bytes). Copy it again, or use another one (best.ckpt, last.ckpt)."
        ) from error
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise ModelError(
            f"'{path}' was not written by scModelForge: it does not hold a config and a gene vocabulary."
        )
    plain = checkpoint[CHECKPOINT_KEY]
    missing = [key for key in ("format_version", "config", "vocab", "labels") if key not in plain]
    missing += ["state_dict"] if "state_dict" not in checkpoint else []
    if missing:
        raise ModelError(f"The checkpoint '{path}' is not complete: it has no {', '.join(missing)}.")
    if plain["format_version"] != FORMAT_VERSION:
        raise ModelError(
            f"'{path}' has format {plain['format_version']}, this version reads format {FORMAT_VERSION}: "
            "use the version of scModelForge that wrote it."
        )
    return checkpoint


def config_of(checkpoint: dict[str, Any], where: str) -> Config:
    """The config inside a checkpoint that `read_checkpoint` gave."""
    plain = checkpoint[CHECKPOINT_KEY]
    _need_plugins(plain.get("plugins", []), where)
    try:
        return Config.model_validate(plain["config"])
    except ValidationError as error:
        raise ModelError(
            f"The config inside '{where}' does not fit this version: {error.errors()[0]['msg']}"
        ) from error


def _need_plugins(records: list[dict[str, str]], where: str) -> None:
    for changed in require_plugins(records, where):
        log.warning("%s", changed)


def _merge_lora(state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Fold adapters into the weights they adapt: W + scale · B A (Hu et al. 2021)."""
    merged = {}
    for name, tensor in state.items():
        if LORA in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain != name and plain.endswith(".weight"):
            stem = name.removesuffix("base_layer.weight")
            adapter = state[f"{stem}lora_B.default.weight"] @ state[f"{stem}lora_A.default.weight"]
            tensor = tensor + scale * adapter
        merged[plain] = tensor
    return merged


def _load_weights(module: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load all tensors; a missing, left-over or misshapen one is an error that names them."""
    own = module.state_dict()
    problems = [f"missing: {name}" for name in own.keys() - state.keys()]
    problems += [f"not part of the model: {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name}: shape {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise ModelError(
            f"The weights in '{where}' do not fit the architecture that its config describes "
            f"({len(problems)} differences):\n  {shown}"
        )
    module.load_state_dict(state)


def bundle_from_checkpoint(checkpoint: dict[str, Any], where: str) -> ModelBundle:
    """The model inside a checkpoint that `read_checkpoint` gave; adapters are merged."""
    plain = checkpoint[CHECKPOINT_KEY]
    config = config_of(checkpoint, where)
    labels = plain["labels"] and Labels(**{**plain["labels"], "classes": tuple(plain["labels"]["classes"])})
    state = checkpoint["state_dict"]
    if config.finetune.lora.enabled and labels:
        state = _merge_lora(state, config.finetune.lora.alpha / config.finetune.lora.rank)
    bundle = assemble(config, GeneVocab.from_plain(plain["vocab"]), labels or None, state, where)
    trained_on = tuple(TrainingCells.from_plain(cells) for cells in plain.get(TRAINING_CELLS, ()))
    return replace(bundle, trained_on=trained_on)


def assemble(
    config: Config, vocab: GeneVocab, labels: Labels | None, state: dict[str, torch.Tensor], where: str
) -> ModelBundle:
    """Build model and head and load `state`, whose keys begin with "model." or "head."; in evaluation mode.

    Raises
    ------
    ModelError
        If a tensor is missing, left over or misshapen; they are named.
    """
    with torch.device("meta"):
        model = build_model(config, vocab)
        head = build_head(config, labels) if labels else None
    both = nn.ModuleDict({"model": model} | ({"head": head} if head else {})).to_empty(device="cpu")
    _load_weights(both, state, where)
    both.eval()
    return ModelBundle(config, vocab, model, labels, head, where)


def load_model(path: str | Path) -> ModelBundle:
    """Load a model from a checkpoint (.ckpt), a model folder or the Hub, on the CPU and in evaluation mode.

    On the Hub it is hf://USER/NAME@COMMIT (or a tag or branch), which is kept in the cache of huggingface_hub.

    Raises
    ------
    ModelError
        If it is missing, damaged, or its parts do not fit each other.
    """
    source, path = str(path), hub.local_path(path)
    source = hub.pinned(source, path)
    if not path.is_dir():
        return bundle_from_checkpoint(read_checkpoint(path), source)
    for name in ("config.yaml", "model.safetensors", "genes.parquet"):
        if not (path / name).is_file():
            found = family_of(path)
            hint = (
                f"\nIt looks like {LOOKS[found]}; 'scmodelforge import' makes a model folder of it."
                if found
                else ""
            )
            raise ModelError(f"'{path}' is not a model folder: it has no {name}.{hint}")
    try:
        with safe_open(path / "model.safetensors", framework="pt") as weights:
            facts = weights.metadata() or {}
            fingerprint = facts.get("vocabulary")
            state = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"'{path / 'model.safetensors'}' is damaged: {error}") from error
    try:
        plugins = list(json.loads(facts.get("plugins", "[]")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ModelError(f"'{path / 'model.safetensors'}' is damaged: its plugins cannot be read.") from error
    _need_plugins(plugins, str(path))
    labels = None
    if (path / "labels.json").is_file():
        try:
            plain = json.loads((path / "labels.json").read_text(encoding="utf-8"))
            labels = Labels(**{**plain, "classes": tuple(plain["classes"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ModelError(f"'{path / 'labels.json'}' cannot be read: {error}") from error
    try:
        config = load_config(path / "config.yaml")
        vocab = GeneVocab.load(path / "genes.parquet")
    except UserError as error:
        raise ModelError(f"The model folder '{path}' is damaged: {error}") from error
    if fingerprint != vocab.fingerprint:
        raise ModelError(
            f"The model folder '{path}' is damaged: genes.parquet is not the vocabulary that the weights in "
            "model.safetensors belong to. Take both files from the same model."
        )
    return replace(assemble(config, vocab, labels, state, source), trained_on=_read_training_cells(path))


def _read_training_cells(folder: Path) -> tuple[TrainingCells, ...]:
    path = folder / f"{TRAINING_CELLS}.safetensors"
    if not path.is_file():
        return ()
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[TRAINING_CELLS])
            plain = [{**fact, "hashes": file.get_tensor(str(place))} for place, fact in enumerate(facts)]
            return tuple(TrainingCells.from_plain(cells) for cells in plain)
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ModelError(f"'{path}' is damaged: {error}") from error


def with_gene_width_of(config: Config, have: Config) -> Config:
    """`config` with the width of gene vectors that `have` took from their file, where `config` leaves it open."""
    model = config.model
    if model.gene_embeddings is None or model.gene_embedding_dim is not None:
        return config
    model = model.model_copy(update={"gene_embedding_dim": have.model.gene_embedding_dim})
    return config.model_copy(update={"model": model})


def with_model_of(config: Config, bundle: ModelBundle, where: str) -> Config:
    """`config` with the model's own tokenizer, architecture, vocabulary and preprocessing.

    Raises
    ------
    ModelError
        If the config asks for something else; the differences are listed.
    """
    have = bundle.config
    config = with_gene_width_of(config, have)
    asked_model = config.model.model_copy(
        update={"preset": have.model.preset}
    )  # its keys are compared, not its name
    problems = [
        *differences(config.tokenizer, have.tokenizer, "tokenizer"),
        *differences(asked_model, have.model, "model"),
        *differences(config.data.preprocessing, have.data.preprocessing, "data.preprocessing"),
    ]
    asked, had = (Path(section.data.gene_vocab).expanduser().resolve() for section in (config, have))
    if "gene_vocab" in config.data.model_fields_set and asked != had:
        problems.append(
            f"data.gene_vocab: {config.data.gene_vocab} in the config, {have.data.gene_vocab} in the model"
        )
    if problems:
        raise ModelError(
            f"The config contradicts the model in '{where}':\n  "
            + "\n  ".join(problems)
            + "\nTake these keys out of the config (the model brings its own), use the config.yaml in the folder of "
            "the model's run, which has all that was given with --set, or use another checkpoint."
        )
    own = {"preprocessing": have.data.preprocessing, "gene_vocab": have.data.gene_vocab}
    return config.model_copy(
        update={
            "tokenizer": have.tokenizer,
            "model": have.model,
            "data": config.data.model_copy(update=own),
        }
    )


def save_bundle(
    bundle: ModelBundle, folder: str | Path, notes: str = "", run: Mapping[str, Any] | None = None
) -> Path:
    """Write a model folder; each file is written whole or not at all. Returns the folder.

    `notes` and `run`, the record in run.json, go into the model card.
    """
    folder = ensure_writable(folder)
    state = {f"model.{name}": tensor.contiguous() for name, tensor in bundle.model.state_dict().items()}
    if bundle.head is not None:
        state |= {f"head.{name}": tensor.contiguous() for name, tensor in bundle.head.state_dict().items()}
    facts = {"vocabulary": bundle.vocab.fingerprint}
    if plugins := plugin_records(bundle.config):
        facts["plugins"] = json.dumps(plugins)
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata=facts)
    bundle.vocab.save(folder / "genes.parquet")
    if bundle.labels is not None:
        write_text(folder / "labels.json", json.dumps(bundle.describe()["labels"], indent=2) + "\n")
    if bundle.trained_on:
        trained_on = [cells.to_plain() for cells in bundle.trained_on]
        hashes = {str(place): cells.pop("hashes") for place, cells in enumerate(trained_on)}
        with atomic_path(folder / f"{TRAINING_CELLS}.safetensors") as temporary:
            save_file(hashes, temporary, metadata={TRAINING_CELLS: json.dumps(trained_on)})
    write_text(folder / "config.yaml", to_yaml(bundle.config))
    write_text(folder / CARD, model_card(bundle, notes, run))
    return folder
