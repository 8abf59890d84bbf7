"""Keys that do nothing in a combination of settings: none of them is passed over in silence.

What cannot work together is an error (`config.misfit`). What works but has no effect is listed here with its reason.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scmodelforge.config import Config, Section
from scmodelforge.config_plugins import plugin_idle, plugin_notes
from scmodelforge.config_presets import PRESETS
from scmodelforge.config_reading import plain_value

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IdleKey:
    """A key that the user wrote and that has no effect.

    Attributes
    ----------
    name
        Dotted.
    reason
        Why it has none.
    changed
        Whether its value is another than the default.
    """

    name: str
    reason: str
    changed: bool

    def __str__(self) -> str:
        return f"{self.name} has no effect: {self.reason}."


def idle_keys(config: Config) -> list[IdleKey]:
    """The keys that the user wrote and that have no effect on pretraining.

    A preset's own keys are not the user's. Where a section has all its keys written, as in a starter config or the
    config.yaml of a run, what is at its default asks for nothing.
    """
    found = []
    for name, reason in _without_effect(config):
        *path, key = name.split(".")
        section = _written(config, path)
        if section is None or key not in section.model_fields_set or _of_preset(config, [*path, key]):
            continue
        changed = getattr(section, key) != type(section).model_fields[key].get_default(
            call_default_factory=True
        )
        if changed or section.model_fields_set < type(section).model_fields.keys():
            found.append(IdleKey(name, reason, changed))
    return found


def say_idle_keys(config: Config) -> None:
    """Say where a config is not its preset, warn of each idle key, and name those that are at their default anyway."""
    if changed := _not_as_preset(config):
        kinds = ("tokenizer.strategy", "model.architecture", "model.pretraining_task")
        level = logging.WARNING if any(line.startswith(kinds) for line in changed) else logging.INFO
        log.log(level, "Not as in the preset %s: %s.", config.model.preset, ", ".join(changed))
    for note in plugin_notes(config):
        log.info("%s", note)
    idle = idle_keys(config)
    for key in idle:
        if key.changed:
            log.warning("%s", key)
    if plain := [key.name for key in idle if not key.changed]:
        log.info("No effect with these settings: %s.", ", ".join(plain))


def _not_as_preset(config: Config) -> list[str]:
    """The keys that the model's preset sets and that have another value, with both."""

    def walk(section: Any, theirs: dict[str, Any], name: str) -> Iterator[str]:
        for key, value in theirs.items():
            ours = getattr(section, key)
            if isinstance(value, dict):
                yield from walk(ours, value, f"{name}{key}.")
            elif ours != value:
                yield f"{name}{key} is {plain_value(ours)} instead of {plain_value(value)}"

    return list(walk(config, PRESETS[config.model.preset].settings, "")) if config.model.preset else []


def _written(config: Config, path: list[str]) -> Section | None:
    """The section at `path` if the user wrote it."""
    section: Any = config
    for part in path:
        if part not in section.model_fields_set:
            return None
        section = getattr(section, part)
    return section


def _of_preset(config: Config, path: list[str]) -> bool:
    """Whether the model's preset sets this key, and to the value that it has."""
    ours: Any = config
    theirs: Any = PRESETS[config.model.preset].settings if config.model.preset else {}
    for part in path:
        ours, theirs = getattr(ours, part), theirs.get(part) if isinstance(theirs, dict) else None
    return theirs is not None and ours == theirs


def _without_effect(config: Config) -> Iterator[tuple[str, str]]:
    """Every key without effect in this combination, and why; whether written or not."""
    yield from _of_data(config)
    yield from _of_tokenizer(config)
    yield from _of_model(config)
    yield from _of_objective(config)
    yield from plugin_idle(config)
    training = config.training
    if training.tokens_per_batch is not None:
        yield "training.batch_size", "training.tokens_per_batch says what a batch holds"
    if training.logger != "wandb":
        yield "training.wandb_project", f"training.logger is {training.logger}"
    if training.scheduler.name == "constant":
        yield "training.scheduler.min_lr_ratio", "training.scheduler.name constant does not decay"


def _of_data(config: Config) -> Iterator[tuple[str, str]]:
    data = config.data
    if config.tokenizer.strategy_like == "rank_value":
        yield "data.preprocessing.log1p", "rank_value takes the ranks before the logarithm"
    if data.preprocessing.normalize == "none":
        yield "data.preprocessing.target_sum", "data.preprocessing.normalize is none"
    if not any("://" in path for path in data.paths):
        yield "data.cache_size_gb", "no file of data.paths is remote"
    if not data.split.val_split:
        yield "data.split.group_key", "data.split.val_split is 0"
    if data.sampling is not None and data.sampling.label_key is None:
        for key in ("label_power", "curriculum_epochs"):
            yield f"data.sampling.{key}", "data.sampling.label_key is null"
    if data.census is not None and data.census.uri is not None:
        yield "data.census.version", "data.census.uri says which Census is read"


def _of_tokenizer(config: Config) -> Iterator[tuple[str, str]]:
    tokenizer, architecture = config.tokenizer, config.model.architecture_like
    strategy = tokenizer.strategy_like
    of_ranks, of_others = ("gene_medians",), ("gene_order", "overlong", "include_zero_genes", "cls_value")
    for keys, needed in (
        (of_ranks, ("rank_value",)),
        (("n_bins", "bin_ties"), ("binned_expression",)),
        (of_others, ("binned_expression", "continuous_projection")),
        (("max_value",), ("continuous_projection",)),
    ):
        if strategy not in needed:
            for key in keys:
                yield f"tokenizer.{key}", f"it belongs to {' and '.join(needed)}, not to {strategy}"
    if strategy != "rank_value" and not tokenizer.prepend_cls:
        yield "tokenizer.cls_value", "tokenizer.prepend_cls is false"
    if architecture != "transformer_encoder":
        why = "a masked_autoencoder hides all that is asked" if architecture == "masked_autoencoder" else ""
        for key in ("mask_token_share", "random_share", "reference"):
            yield f"tokenizer.masking.{key}", why or f"{architecture} masks nothing"
    if architecture == "autoregressive_transformer":
        why = f"{architecture} masks nothing"
        if config.model.task_like == "expression_reconstruction":
            why = "model.objective.generated_share says how many values are asked"
        yield "tokenizer.masking.mask_ratio", why


def _of_model(config: Config) -> Iterator[tuple[str, str]]:
    model = config.model
    if config.value_embedding != "soft_bins":
        yield "model.soft_bins", f"value_embedding is {config.value_embedding}"
    if config.tokenizer.strategy_like == "rank_value":
        yield "model.embedding_norm", "with rank_value there is always one"
    if model.gene_embeddings is None and model.gene_embedding_dim is None:
        yield "model.train_gene_embeddings", "the gene embeddings are learned already"
    if model.task_like == "expression_reconstruction":
        for key in ("gene_head", "gene_head_dim"):
            yield f"model.{key}", "expression_reconstruction names no genes"
    elif model.gene_head == "tied":
        yield "model.gene_head_dim", "model.gene_head is tied"
    if model.architecture_like != "masked_autoencoder":
        for key in ("hidden_dim", "num_layers", "num_heads"):
            yield f"model.decoder.{key}", f"{model.architecture} has no decoder"


def _of_objective(config: Config) -> Iterator[tuple[str, str]]:
    architecture, task = config.model.architecture_like, config.model.task_like
    objective, causal = config.model.objective, architecture == "autoregressive_transformer"
    if task == "expression_reconstruction":
        yield "model.objective.gene_weight", f"{task} names no genes"
    if task in ("masked_gene_prediction", "next_gene"):
        for key in ("value_weight", "value_loss"):
            yield f"model.objective.{key}", f"{task} tells no values"
    if not causal:
        yield "model.objective.reference", "it belongs to autoregressive_transformer"
    if architecture != "masked_autoencoder":
        yield "model.objective.zero_mask_ratio", "it belongs to masked_autoencoder"
    if not (causal and task == "expression_reconstruction"):
        for key in ("generated_share", "second_pass_weight"):
            why = "it belongs to autoregressive_transformer with expression_reconstruction"
            yield f"model.objective.{key}", why
    if not objective.ecs_weight:
        yield "model.objective.ecs_threshold", "model.objective.ecs_weight is 0"
