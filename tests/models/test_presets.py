"""Presets have the published sizes, and keys beside them win."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from scmodelforge.config import Config
from scmodelforge.config_presets import PRESETS
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.bundle import build_model
from scmodelforge.models.published.geneformer import to_bert
from tests.helpers import make_vocab


def built(name: str) -> tuple[Config, CellTransformer]:
    """The model of a preset, without memory for its weights."""
    config = Config.model_validate({"model": {"preset": name}})
    vocab = make_vocab(PRESETS[name].n_genes, layout=config.tokenizer.vocab_layout)
    vocab = vocab.with_obs_categories({column: ["a"] for column in config.obs_columns})
    with torch.device("meta"):
        return config, build_model(config, vocab)


def n_published(name: str) -> int:
    """Parameters as the published checkpoint counts them."""
    config, model = built(name)
    if name.startswith("geneformer"):  # with its two token-type vectors, which ours folds into the ranks
        state = to_bert(model.state_dict(), config.model.num_layers)
        assert len(state) == 10 + 16 * config.model.num_layers
        return sum(tensor.numel() for tensor in state.values())
    extra_tokens = config.model.hidden_dim if name.startswith("scgpt") else 0  # <mask>
    return sum(parameter.numel() for parameter in model.parameters()) - extra_tokens


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_size(name: str) -> None:
    preset = PRESETS[name]
    count = n_published(name)
    if preset.rounding is None:
        assert "not confirmed" in preset.note
        assert count == pytest.approx(preset.n_parameters, rel=0.25)
    else:
        assert abs(count - preset.n_parameters) <= preset.rounding


def test_what_transcriptformer_freezes_is_frozen() -> None:
    _, model = built("transcriptformer-sapiens")
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert frozen == 23_829 * 2560


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_preset_is_the_same_config(name: str) -> None:
    config = Config.model_validate({"model": {"preset": name}})
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_keys_beside_a_preset_win() -> None:
    config = Config.model_validate(
        {
            "model": {"preset": "scgpt-human", "num_layers": 3, "objective": {"cell_weight": 0.5}},
            "tokenizer": {"n_bins": 11},
        }
    )
    assert (config.model.num_layers, config.model.hidden_dim) == (3, 512)
    assert (config.tokenizer.n_bins, config.tokenizer.max_genes) == (11, 1200)
    assert config.model.objective.cell_weight == 0.5
    assert config.model.objective.second_pass_weight == 1.0
    assert config.data.preprocessing.normalize == "none"


def test_an_unknown_preset_is_an_error_with_a_hint() -> None:
    with pytest.raises(ValidationError, match="did you mean geneformer-v2-104m"):
        Config.model_validate({"model": {"preset": "geneformer-v2-104M"}})
