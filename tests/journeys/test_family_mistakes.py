"""Mistakes of someone who tries the families for the first time."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scmodelforge.config import Config
from scmodelforge.config_presets import PRESETS
from tests.journeys.command import call, checkpoint, done, files_below, refused, sets


@pytest.mark.parametrize("preset", ["scgpt-human", "scfoundation", "geneformer-v2-104m"])
def test_a_starter_config_with_a_preset_is_of_that_preset(preset: str, cells: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    done("init", cells, "--output", path, *sets(model__preset=preset))
    config = Config.model_validate(yaml.safe_load(path.read_text()))
    asked = Config.model_validate({"model": {"preset": preset}})
    assert (config.model, config.tokenizer) == (asked.model, asked.tokenizer)
    assert config.data.preprocessing == asked.data.preprocessing
    assert config.finetune.label_key == "cell_type"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"model__preset": "geneformer"},
            ("--set model.preset: ", *(name for name in PRESETS if name.startswith("geneformer"))),
        ),
        (
            {"model__preset": "scgpt-human", "tokenizer__strategy": "rank_value"},
            ("--set tokenizer.strategy: ", "do not fit together", "Nearest that works"),
        ),
        (
            {"model__preset": "scgpt-human", "model__value_embedding": "none"},
            ("--set model.value_embedding: ", "must enter the model"),
        ),
        ({"tokenizer__obs_tokens": "[cell_type, cell_type]"}, ("names a column twice",)),
        ({"model__objective__gene_weight": 0}, ("--set model.objective.gene_weight", "nothing to learn")),
        (
            {
                "tokenizer__strategy": "binned_expression",
                "tokenizer__prepend_cls": "false",
                "model__pooling": "cls",
            },
            ("model.pooling cls needs a <cls> token", "tokenizer.prepend_cls: true"),
        ),
        ({"tokenizer__obs_tokens": "[assay]"}, ("no obs column 'assay'", "cell_type", "obs_tokens: []")),
    ],
)
def test_what_contradicts_is_refused_at_the_key(
    keys: dict[str, object], words: tuple[str, ...], config: Path, tmp_path: Path
) -> None:
    refused("train", "--config", config, *sets(**keys, training__run_dir=tmp_path / "run"), words=words)
    assert files_below(tmp_path) == []


def test_one_wrong_name_is_one_problem(config: Path) -> None:
    wrong = sets(tokenizer__strategy="binned", model__pretraining_task="dual_prediction")
    message = refused("train", "--config", config, *wrong, words=("'binned' does not exist",))
    assert "1 problem" in message


def test_check_looks_for_the_columns_that_the_model_reads(cells: Path) -> None:
    answer = call("check", cells, *sets(model__preset="transcriptformer-sapiens"))
    assert answer.code == 2
    assert "there is no obs column 'assay'" in answer.out
    assert "not used by this command" not in answer.err


def test_it_is_said_where_a_model_is_not_its_preset(config: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["training"] |= {"run_dir": str(tmp_path / "run"), "max_steps": 1}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings))
    ranks = sets(model__preset="geneformer-v1-10m", model__ffn_dim=16)
    answer = done("train", "--config", path, *ranks)
    assert "Not as in the preset geneformer-v1-10m: " in answer.err
    assert "model.hidden_dim is 16 instead of 256" in answer.err
    assert "Warning: Not as" not in answer.err
    answer = done(
        *("train", "--config", path, *ranks),
        *sets(model__architecture="autoregressive_transformer", model__pretraining_task="next_gene"),
        *sets(tokenizer__vocab_layout="geneformer_v2", tokenizer__prepend_cls="true"),
    )
    assert "Warning: Not as in the preset geneformer-v1-10m: " in answer.err


def test_pooling_by_window_and_keys_that_do_nothing_here(cells: Path, trained: Path, tmp_path: Path) -> None:
    embed = ("embed", "--model", checkpoint(trained), "--data", cells, "--output", tmp_path / "e.h5ad")
    answer = done(*embed, "--pooling", "window", *sets(data__extend_vocab="mean"))
    assert "Warning: data.extend_vocab has no effect here" in answer.err
    refused(*embed, "--pooling", "max", words=("mean, cls or window",))


def test_a_run_that_cannot_go_on_says_values_as_yaml_does(config: Path, trained: Path) -> None:
    refused(
        *("train", "--config", config, "--resume", trained / "checkpoints" / "last.ckpt"),
        *sets(model__bias="false", model__ffn_dim=24),
        words=("model.bias: false in the config, true in the run", "24 in the config, null", "--checkpoint"),
    )
