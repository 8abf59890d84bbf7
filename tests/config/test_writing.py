"""Schema, comparison with a model, and the YAML that we write."""

from __future__ import annotations

import json
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.config import Config
from scmodelforge.config_io import (
    Suggestions,
    config_schema,
    differences,
    parse_config,
    starter_yaml,
    to_yaml,
)
from scmodelforge.errors import ConfigError

SUGGESTED = Suggestions(
    layer="counts",
    gene_vocab="mouse_protein_coding",
    label_key="cell type: fine",
    batch_key="batch",
    group_key="donor",
    batch_size=32,
    warmup_steps=50,
    model={"hidden_dim": 128, "num_heads": 4},
)


@pytest.mark.parametrize("comments", [False, True])
def test_the_resolved_config_reads_back_the_same(comments: bool) -> None:
    config = parse_config(
        {
            "data": {"paths": ["a b.h5ad", "null"], "preprocessing": {"hvg": {"n_top_genes": 10}}},
            "training": {"optimizer": {"lr": 1e-5}},
        }
    )
    text = to_yaml(config, comments=comments)
    assert parse_config(yaml.safe_load(text)) == config
    assert yaml.safe_load(text) == config.model_dump(mode="json")  # every default written out


names = st.text(string.printable, min_size=1, max_size=10)


@settings(max_examples=100, deadline=None)
@given(names, names, st.floats(1e-12, 1e12), st.booleans())
def test_any_text_and_number_survives_writing(layer: str, path: str, lr: float, comments: bool) -> None:
    config = parse_config({"data": {"layer": layer, "paths": [path]}, "training": {"optimizer": {"lr": lr}}})
    assert parse_config(yaml.safe_load(to_yaml(config, comments=comments))) == config


def test_the_starter_holds_what_was_suggested_and_loads() -> None:
    text = starter_yaml("data/my cells.h5ad", SUGGESTED)
    config = parse_config(yaml.safe_load(text))
    assert config.data.paths == ["data/my cells.h5ad"]
    assert (config.data.layer, config.data.gene_vocab) == ("counts", "mouse_protein_coding")
    assert config.data.split.group_key == "donor"
    assert (config.training.batch_size, config.training.scheduler.warmup_steps) == (32, 50)
    assert (config.model.hidden_dim, config.model.num_heads) == (128, 4)
    probe, quality = config.eval.benchmarks
    assert (probe.params.cell_type_key, probe.params.group_key) == ("cell type: fine", "donor")
    assert (quality.params.cell_type_key, quality.params.batch_key) == ("cell type: fine", "batch")
    assert config.finetune.label_key == "cell type: fine"


def test_the_starter_explains_every_key() -> None:
    lines = starter_yaml("a.h5ad").splitlines()
    top = lines.index("# Which benchmarks run, and how cells are embedded for them.")
    keys = [
        i for i, line in enumerate(lines[:top]) if line.strip() and not line.lstrip().startswith(("#", "-"))
    ]
    assert len(keys) > 50
    assert all(lines[i - 1].lstrip().startswith("# ") for i in keys)
    assert "  # Width of the hidden states. (Default: 512.)" in starter_yaml("a.h5ad", SUGGESTED).splitlines()
    assert "One of: pre, post, normed_residual." in starter_yaml("a.h5ad")
    assert max(map(len, lines)) <= 110


def test_a_starter_without_suggestions_has_the_defaults() -> None:
    config = parse_config(yaml.safe_load(starter_yaml("a.h5ad")))
    assert config.model_copy(update={"data": Config().data, "eval": Config().eval}) == Config()


def test_impossible_suggestions_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be divisible"):
        starter_yaml("a.h5ad", Suggestions(model={"hidden_dim": 10, "num_heads": 3}))


def test_the_schema_is_json_and_knows_names_and_help() -> None:
    schema = json.loads(json.dumps(config_schema()))
    assert set(schema["properties"]) == set(Config.model_fields)
    tokenizer = schema["$defs"]["TokenizerConfig"]
    assert tokenizer["additionalProperties"] is False
    assert "rank_value" in tokenizer["properties"]["strategy"]["enum"]
    assert tokenizer["properties"]["max_genes"]["description"].startswith("Longest input in tokens")
    for name, section in schema["$defs"].items():
        for key, value in section["properties"].items():
            assert "description" in value or "$ref" in value or "const" in value, f"{name}.{key} has no help"


def test_differences_are_those_that_the_user_wrote() -> None:
    asked = parse_config(
        {
            "tokenizer": {"max_genes": 1024, "strategy": "rank_value", "masking": {"mask_ratio": 0.4}},
            "model": {"ffn_dim": None, "norm": "post"},
            "training": {"optimizer": {"betas": [0.9, 0.98]}},
        }
    )
    model = parse_config({"tokenizer": {"append_eos": True}, "model": {"hidden_dim": 256, "ffn_dim": 64}})
    assert differences(asked, model) == [
        "tokenizer.max_genes: 1024 in the config, 2048 in the model",
        "tokenizer.masking.mask_ratio: 0.4 in the config, 0.3 in the model",
        "model.ffn_dim: null in the config, 64 in the model",
        "model.norm: post in the config, pre in the model",
        "training.optimizer.betas: [0.9, 0.98] in the config, [0.9, 0.999] in the model",
    ]
    assert differences(asked.tokenizer, model.tokenizer, "tokenizer") == differences(asked, model)[:2]
    assert differences(Config(), model) == []


def test_a_section_on_one_side_only_is_a_difference() -> None:
    asked = parse_config({"data": {"preprocessing": {"hvg": {"n_top_genes": 5}}}})
    assert differences(asked, Config()) == [
        'data.preprocessing.hvg: {"n_top_genes": 5, "flavor": "seurat"} in the config, null in the model'
    ]
