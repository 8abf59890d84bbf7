"""Names that packages bring: known without an import, never there twice, and broken ones named with their package."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scmodelforge import registry
from scmodelforge.config import Config
from scmodelforge.config_io import parse_config
from scmodelforge.config_plugins import require_plugins
from scmodelforge.errors import ConfigError, PluginError
from scmodelforge.models.bundle import ModelBundle, load_model, save_bundle
from tests.helpers import untrained_annotator
from tests.journeys.command import done, refused

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make packages that have a module and entry points, as pip would leave them."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def one(package: str, group: str, name: str, target: str, code: str = "", version: str = "1.0") -> None:
        info = site / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[scmodelforge.{group}]\n{name} = {target}\n")
        (site / f"{target.partition(':')[0]}.py").write_text(code)
        registry.plugins_in.cache_clear()

    yield one
    registry.plugins_in.cache_clear()
    for module in ("first_plugin", "second_plugin"):
        sys.modules.pop(module, None)


def problem(tree: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    return str(caught.value)


def test_names_are_known_without_an_import(install: Install) -> None:
    install("first", "tokenizers", "mine", "first_plugin:Mine", "raise SystemExit('imported')")
    assert registry.TOKENIZERS.check("mine") == "mine"
    assert "mine" in registry.TOKENIZERS.names
    assert "  mine  tokenizer strategy  first 1.0" in done("strategies").out.splitlines()
    assert "Did you mean 'mine'?" in problem({"tokenizer": {"strategy": "mime"}})
    assert "first_plugin" not in sys.modules


@pytest.mark.parametrize("name", ["mine", "rank_value"])
def test_a_name_that_is_there_twice_is_an_error_with_both_packages(install: Install, name: str) -> None:
    install("first", "tokenizers", name, "first_plugin:Mine")
    owners = "scmodelforge and 'first'"
    if name == "mine":
        install("second", "tokenizers", name, "second_plugin:Mine")
        owners = "'first' and 'second'"
    text = problem({"tokenizer": {"strategy": name}})
    assert f"the tokenizer strategy '{name}' is there more than once: {owners} bring it" in text
    assert "(entry points 'scmodelforge.tokenizers'). Uninstall first" in text
    refused("strategies", words=(owners,))


def test_a_name_that_is_there_twice_does_not_hinder_the_others(install: Install) -> None:
    install("first", "tokenizers", "rank_value", "first_plugin:Mine")
    other = {"tokenizer": {"strategy": "binned_expression"}}
    assert parse_config(other | {"model": {"pretraining_task": "dual_prediction"}})


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1", "AttributeError: module 'first_plugin' has no attribute 'Mine'"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
        ("this is no Python", "SyntaxError: "),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named(install: Install, code: str, words: str) -> None:
    install("first", "architectures", "mine", "first_plugin:Mine", code)
    with pytest.raises(PluginError) as caught:
        parse_config({"model": {"architecture": "mine"}})
    assert (
        "The model architecture 'mine' of the package first 1.0 cannot be imported (entry point 'mine = "
        f"first_plugin:Mine' of the group 'scmodelforge.architectures'): {words}" in str(caught.value)
    )


def test_a_plugin_must_say_what_it_is_like(install: Install) -> None:
    install("first", "tasks", "mine", "first_plugin:Mine", "class Mine: like = 'nothing'")
    with pytest.raises(PluginError) as caught:
        parse_config({"model": {"pretraining_task": "mine"}})
    assert (
        "The pretraining task 'mine' of the package first 1.0 does not say what it is like: its attribute 'like' is "
        "'nothing', and must be one of dual_prediction, expression_reconstruction" in str(caught.value)
    )


def test_what_a_plugin_is_like_decides_what_it_fits(install: Install) -> None:
    install("first", "tasks", "mine", "first_plugin:Mine", "class Mine: like = 'next_gene'")
    text = problem({"model": {"pretraining_task": "mine"}})
    assert "model.pretraining_task mine do not fit together: only a causal model has a next gene" in text
    causal = {"architecture": "autoregressive_transformer", "pretraining_task": "mine"}
    assert parse_config({"model": causal}).model.task_like == "next_gene"


def test_params_that_nobody_reads_are_an_error(install: Install) -> None:
    text = problem({"tokenizer": {"params": {"k": 1}}, "model": {"task_params": {"k": 1}}})
    assert "tokenizer.params: rank_value has no params of its own; leave them out" in text
    assert "model.task_params: masked_gene_prediction has no params of its own; leave them out" in text
    install("first", "architectures", "mine", "first_plugin:Mine", "class Mine: like = 'transformer_encoder'")
    text = problem({"model": {"architecture": "mine", "params": {"k": 1}}})
    assert "model.params: mine has no params of its own; leave them out" in text


NEEDS_K = """
from scmodelforge.config import Section
class K(Section):
    k: int
class Mine:
    like, Params = 'transformer_encoder', K
"""


def test_params_have_lines_and_can_be_required(install: Install, tmp_path: Path) -> None:
    install("first", "architectures", "mine", "first_plugin:Mine", NEEDS_K)
    assert "model.params: mine needs k" in problem({"model": {"architecture": "mine"}})
    assert "model.params.k: is required" in problem({"model": {"architecture": "mine", "params": {}}})
    file = tmp_path / "config.yaml"
    file.write_text("model:\n  architecture: mine\n  params:\n    k: many\n")
    refused(
        *("train", "--config", file), words=(f"{file}:4: model.params.k: must be a whole number, not 'many'",)
    )
    config = parse_config({"model": {"architecture": "mine", "params": {"k": 3}}})
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert config.model.params.k == 3  # type: ignore[union-attr]


@pytest.fixture
def folder(install: Install, tmp_path: Path) -> Path:
    """A model folder whose architecture is that of package first 1.0."""
    code = "from scmodelforge.models.encoder import TransformerEncoder\n"
    code += "class Mine(TransformerEncoder): like = 'transformer_encoder'"
    install("first", "architectures", "mine", "first_plugin:Mine", code)
    plain = untrained_annotator()
    config = plain.config.model_copy(
        update={"model": plain.config.model.model_copy(update={"architecture": "mine"})}
    )
    return save_bundle(
        ModelBundle(config, plain.vocab, plain.model, plain.labels, plain.head), tmp_path / "m"
    )


def test_another_version_is_said_and_used(
    folder: Path, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert type(load_model(folder).model).__name__ == "Mine"
    assert caplog.messages == []
    site = folder.parent / "site"
    old = site / "first-1.0.dist-info"
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: first\nVersion: 2.0\n")
    registry.plugins_in.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    assert caplog.messages == [
        f"The model architecture 'mine' of '{folder}' was that of first 1.0; now it is that of first 2.0."
    ]


@pytest.mark.parametrize(
    "records",
    [
        [{"key": "model.architecture", "name": "mine", "package": "first; rm -rf /", "version": "1.0"}],
        [{"key": "os.system", "name": "mine", "package": "first", "version": "1.0"}],
        [{"key": "model.architecture"}],
        ["mine"],
    ],
)
def test_what_a_model_says_about_its_plugins_is_not_trusted(records: object) -> None:
    with pytest.raises(PluginError, match="cannot be read"):
        require_plugins(records, "m")  # type: ignore[arg-type]
