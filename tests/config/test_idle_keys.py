"""A key that does nothing in its combination is named, with the reason; keys that matter are not."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from scmodelforge.config import Config
from scmodelforge.config_idle import _without_effect, idle_keys, say_idle_keys
from scmodelforge.config_io import starter_yaml, to_yaml
from scmodelforge.config_presets import PRESETS
from scmodelforge.strategies import TABLE
from scmodelforge.training.run import train
from tests.helpers import marker_cells, tiny_config

SCGPT = {
    "tokenizer": {"strategy": "binned_expression"},
    "model": {"pretraining_task": "expression_reconstruction"},
}
GENERATIVE = {
    "tokenizer": {"strategy": "binned_expression"},
    "model": {
        "architecture": "autoregressive_transformer",
        "pretraining_task": "expression_reconstruction",
    },
}
NEXT = {"model": {"architecture": "autoregressive_transformer", "pretraining_task": "next_gene"}}
SCFOUNDATION = {
    "tokenizer": {"strategy": "continuous_projection"},
    "model": {"architecture": "masked_autoencoder", "pretraining_task": "expression_reconstruction"},
}

MIXTURE = {"data": {"sampling": {"mixture": {"*": 1}}}}


def with_key(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return tree | {head: with_key(tree.get(head, {}), rest, value) if rest else value}


def named(tree: dict[str, Any]) -> list[str]:
    return [key.name for key in idle_keys(Config.model_validate(tree))]


@pytest.mark.parametrize(
    ("tree", "key", "value"),
    [
        ({"training": {"tokens_per_batch": 9000}}, "training.batch_size", 32),
        ({}, "tokenizer.n_bins", 20),
        ({}, "tokenizer.n_bins", 51),  # the default, but written
        ({}, "tokenizer.bin_ties", "numpy"),
        ({}, "tokenizer.gene_order", "value"),
        ({}, "tokenizer.overlong", "first"),
        ({}, "tokenizer.include_zero_genes", True),
        ({}, "tokenizer.max_value", 30),
        ({}, "tokenizer.cls_value", 1.0),
        ({}, "data.preprocessing.log1p", True),
        ({"data": {"preprocessing": {"normalize": "none"}}}, "data.preprocessing.target_sum", 1e6),
        ({"data": {"split": {"val_split": 0}}}, "data.split.group_key", "donor"),
        (MIXTURE, "data.sampling.label_power", 0.5),
        (MIXTURE, "data.sampling.curriculum_epochs", 3),
        ({}, "data.cache_size_gb", 10),
        (SCGPT, "tokenizer.gene_medians", "none"),
        (SCGPT, "tokenizer.max_value", 30),
        (with_key(SCGPT, "tokenizer.prepend_cls", False), "tokenizer.cls_value", 1.0),
        (NEXT, "tokenizer.masking.mask_ratio", 0.3),
        (GENERATIVE, "tokenizer.masking.mask_ratio", 0.3),
        (SCFOUNDATION, "tokenizer.masking.mask_token_share", 0.5),
        (SCFOUNDATION, "tokenizer.masking.random_share", 0.0),
        ({}, "model.soft_bins", 50),
        ({}, "model.embedding_norm", False),
        ({}, "model.train_gene_embeddings", True),
        (SCFOUNDATION, "model.gene_head", "mlp"),
        ({}, "model.gene_head_dim", 64),
        ({}, "model.decoder.num_layers", 3),
        ({}, "model.objective.value_loss", "mse"),
        ({}, "model.objective.value_weight", 2.0),
        (SCGPT, "model.objective.gene_weight", 2.0),
        ({}, "model.objective.reference", True),
        (SCGPT, "model.objective.zero_mask_ratio", 0.1),
        (SCGPT, "model.objective.generated_share", 0.1),
        (SCGPT, "model.objective.second_pass_weight", 0.1),
        ({}, "model.objective.ecs_threshold", 0.1),
        ({}, "training.wandb_project", "mine"),
        ({"training": {"scheduler": {"name": "constant"}}}, "training.scheduler.min_lr_ratio", 0.1),
    ],
)
def test_a_key_without_effect_is_named(tree: dict[str, Any], key: str, value: Any) -> None:
    assert key not in named(tree)
    assert named(with_key(tree, key, value)) == [key]


@pytest.mark.parametrize(
    ("tree", "key", "value"),
    [
        ({}, "tokenizer.gene_medians", "none"),
        (with_key(MIXTURE, "data.sampling.label_key", "donor"), "data.sampling.label_power", 0.5),
        ({}, "tokenizer.masking.mask_ratio", 0.3),
        ({}, "model.objective.gene_weight", 2.0),
        (SCGPT, "tokenizer.n_bins", 20),
        (SCGPT, "tokenizer.masking.random_share", 0.0),
        (SCGPT, "tokenizer.cls_value", 1.0),
        (SCGPT, "model.objective.value_weight", 2.0),
        (SCFOUNDATION, "tokenizer.masking.mask_ratio", 0.3),
        (SCFOUNDATION, "model.decoder.num_layers", 3),
        (SCFOUNDATION, "model.soft_bins", 50),
        (SCFOUNDATION, "model.objective.zero_mask_ratio", 0.1),
        (SCFOUNDATION, "tokenizer.max_value", 30),
        (GENERATIVE, "model.objective.generated_share", 0.1),
        (NEXT, "model.objective.reference", True),
    ],
)
def test_a_key_with_effect_is_not_named(tree: dict[str, Any], key: str, value: Any) -> None:
    assert named(with_key(tree, key, value)) == []


def test_a_key_written_at_its_default_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tree = with_key(with_key({}, "tokenizer.n_bins", 51), "tokenizer.max_value", 30)
    say_idle_keys(Config.model_validate(tree))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        (
            "WARNING",
            "tokenizer.max_value has no effect: it belongs to continuous_projection, not to rank_value.",
        ),
        ("INFO", "No effect with these settings: tokenizer.n_bins."),
    ]


def test_a_config_with_every_key_written_out_names_changed_ones_only() -> None:
    import yaml

    for text in (starter_yaml("cells.h5ad"), to_yaml(Config())):
        assert named(yaml.safe_load(text)) == []
        assert named(with_key(yaml.safe_load(text), "tokenizer.max_value", 30)) == ["tokenizer.max_value"]


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_sets_is_not_the_user_s(name: str) -> None:
    assert named({"model": {"preset": name}}) == []


def test_a_preset_s_key_that_the_user_changes_is(caplog: pytest.LogCaptureFixture) -> None:
    tree = {"model": {"preset": "geneformer-v1-10m"}}
    assert named(with_key(tree, "tokenizer.n_bins", 20)) == ["tokenizer.n_bins"]


@pytest.mark.parametrize(
    "row", [row for row in TABLE.values() if row.allowed], ids=lambda row: f"{row.tokenizer}-{row.task}"
)
def test_every_name_in_the_list_is_a_key(row) -> None:
    config = Config.model_validate(
        {
            "tokenizer": {"strategy": row.tokenizer},
            "model": {"architecture": row.architecture, "pretraining_task": row.task},
        }
    )
    assert idle_keys(config) == []
    for name, reason in _without_effect(config):
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        assert reason


def test_training_says_it_once_and_keeps_it_with_the_run(tmp_path, caplog) -> None:
    config = tiny_config(tmp_path, tokenizer={"max_value": 30}, training={"max_epochs": 1})
    result = train(config, data=marker_cells(60))
    said = [r.getMessage() for r in caplog.records if "max_value has no effect" in r.getMessage()]
    assert len(said) == 1
    assert said[0] in (result.run_dir / "run.json").read_text()
