"""Settings that are right by themselves and contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scmodelforge.config import Config


def misfit(config: Config) -> str:
    """Say the first thing that does not fit together across sections; "" if all does."""
    for rules in (_data, _census, _values, _causal, _autoencoder, _objective):
        if problem := next((text for wrong, text in rules(config) if wrong), ""):
            return problem
    return ""


def _data(config: Config) -> list[tuple[bool, str]]:
    data = config.data
    return [
        (
            data.sampling is not None and data.shuffle_buffer is not None,
            "data.sampling draws cells from everywhere, and data.shuffle_buffer reads neighbours together: set "
            "data.shuffle_buffer: null and make the files quick to read first (scmodelforge shard), or data.sampling: "
            "null",
        )
    ]


def _census(config: Config) -> list[tuple[bool, str]]:
    data, census = config.data, config.data.census
    if data.source != "census":
        return [
            (census is not None, "data.census is there, but data.source is local: set data.source: census")
        ]
    if census is None:
        needed = "data.source census needs data.census, which says what cells to read: organism, tissue_general, ..."
        return [(True, needed)]
    rules = [
        (
            bool(data.paths),
            "data.paths: with data.source census the cells come from the Census; leave paths out",
        ),
        (
            data.layer is not None,
            "data.layer: the Census has one layer of raw counts, which is read; set null",
        ),
    ]
    read: dict[str, list[str | None]] = {
        "data.split.group_key": [data.split.group_key],
        "tokenizer.obs_tokens": [*config.tokenizer.obs_tokens],
        "model.objective.batch_key": [config.model.objective.batch_key],
    }
    return rules + [
        (
            column not in (None, *census.columns),
            f"{key} reads the obs column '{column}', which data.census.obs_columns does not name: add it there",
        )
        for key, columns in read.items()
        for column in columns
    ]


def _values(config: Config) -> list[tuple[bool, str]]:
    model, tokenizer = config.model, config.tokenizer
    embedding, loss = config.value_embedding, config.value_loss
    ranks, bins = tokenizer.strategy_like == "rank_value", tokenizer.strategy_like == "binned_expression"
    causal = model.architecture_like == "autoregressive_transformer"
    counts = causal and config.carries_counts
    return [
        (
            ranks and embedding != "none",
            f"model.value_embedding is {embedding}, but tokenizer.strategy rank_value carries ranks: set none",
        ),
        (
            embedding == "category" and not bins,
            "model.value_embedding category needs bins: tokenizer.strategy binned_expression",
        ),
        (
            embedding == "category" and not _is_bin(tokenizer.cls_value, tokenizer.n_bins),
            f"tokenizer.cls_value {tokenizer.cls_value:g} is no bin, and value_embedding category in model has vectors "
            f"for bins only: set 0 to {tokenizer.n_bins - 1}, or -2 for scGPT's padding value",
        ),
        (
            tokenizer.masking.reference
            and model.architecture_like == "transformer_encoder"
            and model.task_like != "masked_gene_prediction",
            "tokenizer.masking.reference asks special tokens too, which have no value to tell: set it to false, or "
            "model.pretraining_task: masked_gene_prediction",
        ),
        (
            embedding == "none" and model.task_like == "expression_reconstruction",
            "model.value_embedding none: expression_reconstruction tells hidden values from visible ones, so they "
            "must enter the model",
        ),
        (
            loss == "cross_entropy" and not bins,
            "model.objective.value_loss cross_entropy needs bins: tokenizer.strategy binned_expression",
        ),
        (
            loss == "zero_truncated_poisson" and not (counts and model.task_like == "dual_prediction"),
            "model.objective.value_loss zero_truncated_poisson needs counts and a causal model: tokenizer.strategy "
            "continuous_projection, data.preprocessing normalize: none and log1p: false, model.architecture "
            "autoregressive_transformer and pretraining_task dual_prediction",
        ),
        (
            loss == "zero_truncated_poisson" and tokenizer.include_zero_genes,
            "model.objective.value_loss zero_truncated_poisson is about counts from 1 on: set "
            "tokenizer.include_zero_genes: false",
        ),
        (
            model.count_bias and not (counts and model.task_like != "expression_reconstruction"),
            "model.count_bias needs an autoregressive_transformer on counts: tokenizer.strategy continuous_projection, "
            "data.preprocessing normalize: none and log1p: false, and pretraining_task next_gene or dual_prediction",
        ),
        (
            model.pooling == "cls" and not (tokenizer.prepend_cls or ranks),
            "model.pooling cls needs a <cls> token: set tokenizer.prepend_cls: true, or pooling: mean",
        ),
        (
            tokenizer.vocab_layout == "scgpt" and tokenizer.append_eos,
            "tokenizer.append_eos: the vocab_layout scgpt has no <eos>",
        ),
    ]


def _is_bin(value: float, n_bins: int) -> bool:
    """Whether the category embedding has a row for it; numbers below 0 stand for hidden values and padding."""
    return value.is_integer() and value < n_bins


def _causal(config: Config) -> list[tuple[bool, str]]:
    model, tokenizer, objective = config.model, config.tokenizer, config.model.objective
    if model.architecture_like != "autoregressive_transformer":
        return []
    rules = [
        (
            not tokenizer.prepend_cls,
            "tokenizer.prepend_cls must be true for an autoregressive model, which starts from <cls>",
        )
    ]
    if model.task_like == "expression_reconstruction":
        return rules
    return [
        *rules,
        (
            model.pooling == "cls",
            "model.pooling cls does not fit an autoregressive model: <cls> comes first and has seen no gene; use mean "
            "or window",
        ),
        (
            objective.reference and tokenizer.append_eos,
            "model.objective.reference puts <eos> at the end of a full window by itself: set "
            "tokenizer.append_eos: false",
        ),
        (
            bool(objective.cell_weight or objective.ecs_weight or objective.batch_weight),
            "model.objective: cell_weight, ecs_weight and batch_weight belong to models that see the whole cell; an "
            "autoregressive model has them with pretraining_task expression_reconstruction only",
        ),
    ]


def _autoencoder(config: Config) -> list[tuple[bool, str]]:
    objective, embedding = config.model.objective, config.value_embedding
    if config.model.architecture_like != "masked_autoencoder":
        return []
    return [
        (
            embedding not in ("soft_bins", "continuous"),
            f"model.value_embedding {embedding} does not fit masked_autoencoder: use soft_bins or continuous",
        ),
        (
            config.tokenizer.include_zero_genes,
            "tokenizer.include_zero_genes: the encoder of a masked_autoencoder reads expressed genes only",
        ),
        (
            objective.batch_labels,
            "model.objective.batch_labels: the decoder of a masked_autoencoder is not told the batch",
        ),
        (
            objective.zero_probability,
            "model.objective.zero_probability: a masked_autoencoder has no such head",
        ),
    ]


def _objective(config: Config) -> list[tuple[bool, str]]:
    model, objective = config.model, config.model.objective
    names_genes = model.task_like != "expression_reconstruction"
    tells_values = model.task_like not in ("masked_gene_prediction", "next_gene")
    main = ["gene_weight"] * names_genes + ["value_weight"] * tells_values
    weights = [getattr(objective, key) for key in (*main, "cell_weight", "ecs_weight", "batch_weight")]
    return [
        (
            not any(weights),
            f"{' and '.join(f'model.objective.{key}' for key in main)} 0: the model has nothing to learn",
        ),
        (
            objective.batch_labels and (not tells_values or config.value_loss == "zero_truncated_poisson"),
            "model.objective.batch_labels: this model has no expression head that could be told the batch",
        ),
        (
            objective.zero_probability and model.task_like != "expression_reconstruction",
            "model.objective.zero_probability belongs to pretraining_task expression_reconstruction",
        ),
        (
            objective.zero_probability and not config.tokenizer.include_zero_genes,
            "model.objective.zero_probability needs zeros in the input: tokenizer.include_zero_genes: true",
        ),
    ]
