"""A config with mistakes yields one error that names each of them, its line and what to do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.config import Config
from scmodelforge.config_io import check_paths, load_config, parse_config
from scmodelforge.errors import ConfigError

CONTRACT = Path(__file__).parent / "contract"

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a config into an empty working folder; messages name it 'c.yaml'."""
    monkeypatch.chdir(tmp_path)

    def write_config(text: str | bytes) -> Path:
        Path("c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return Path("c.yaml")

    return write_config


def problems(path: Path | None, *overrides: str, require_data: bool = False) -> list[str]:
    """Return the lines of the error that reading this config raises, without the headline."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, require_data=require_data)
    headline, *lines = str(caught.value).splitlines()
    assert headline == f"The config has {len(lines)} problem{'s' if len(lines) > 1 else ''}:"
    return [line.strip() for line in lines]


# --- what is right --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "finetune", "eval"])
def test_contract_files_load_as_they_are(name: str) -> None:
    path = CONTRACT / f"{name}_config.yaml"
    config = load_config(path)
    written = yaml.safe_load(path.read_text())
    assert config.model_dump(mode="json", exclude_unset=True) == written


def test_no_file_means_defaults() -> None:
    assert load_config(None) == Config()


def test_numbers_in_scientific_notation_are_numbers(write: Write) -> None:
    config = load_config(write("training:\n  optimizer: {lr: 1e-4, betas: ['9e-1', 99e-2]}\n"))
    assert config.training.optimizer.lr == 1e-4
    assert config.training.optimizer.betas == (0.9, 0.99)


def test_an_empty_section_takes_its_defaults(write: Write) -> None:
    assert load_config(write("training:\ndata:\n  split:\n")) == Config()


def test_null_stays_null_where_a_section_is_optional(write: Write) -> None:
    assert load_config(write("data: {preprocessing: {hvg: null}}")).data.preprocessing.hvg is None


def test_anchors_and_merge_keys_work(write: Write) -> None:
    text = (
        "eval:\n  benchmarks:\n"
        "    - {name: linear_probe, params: &probe {cell_type_key: label, test_size: 0.3}}\n"
        "    - {name: linear_probe, params: {<<: *probe, test_size: 0.4}}\n"
        "    - {name: linear_probe, params: *probe}\n"
    )
    config = load_config(write(text), ["eval.benchmarks.2.params.test_size=0.5"])
    assert [b.params.cell_type_key for b in config.eval.benchmarks] == ["label"] * 3
    assert [b.params.test_size for b in config.eval.benchmarks] == [0.3, 0.4, 0.5]


def test_dates_are_text(write: Write) -> None:
    assert load_config(write("training: {run_dir: 2026-01-31}")).training.run_dir == "2026-01-31"


def test_a_byte_order_mark_is_no_problem(write: Write) -> None:
    assert load_config(write(b"\xef\xbb\xbfmodel: {num_heads: 4}")).model.num_heads == 4


# --- overrides ------------------------------------------------------------------------------------


def test_overrides_win_and_later_ones_win_over_earlier(write: Write) -> None:
    path = write("training: {max_epochs: 10, seed: 1}")
    config = load_config(path, ["training.max_epochs=2", "training.max_epochs=3", "model.num_heads=4"])
    assert (config.training.max_epochs, config.training.seed, config.model.num_heads) == (3, 1, 4)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.paths=[a.h5ad, 'b c.h5ad']", ["a.h5ad", "b c.h5ad"]),
        ("data.layer=counts", "counts"),
        ("data.layer=", None),
        ("data.layer=null", None),
        ("data.preprocessing.target_sum=1e4", 10_000),
        ("data.preprocessing.log1p=false", False),
        ("data.preprocessing.hvg.n_top_genes=2000", 2000),
        ("data.layer=a=b", "a=b"),
    ],
)
def test_the_value_of_an_override_is_yaml(override: str, value: object) -> None:
    config = load_config(None, [override])
    found: object = config
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


def test_what_the_user_wrote_can_be_told_from_defaults(write: Write) -> None:
    config = load_config(write("model: {num_heads: 8}"), ["tokenizer.masking.mask_ratio=0.15"])
    assert config.model_fields_set == {"model", "tokenizer"}
    assert config.model.model_fields_set == {"num_heads"}
    assert config.tokenizer.model_fields_set == {"masking"}
    assert config.tokenizer.masking.model_fields_set == {"mask_ratio"}


def test_wrong_overrides_are_named_as_typed(write: Write) -> None:
    path = write("model:\n  hidden_dim: 512\n  num_heads: 8\n")
    found = problems(
        path, "nonsense", "=3", "data.=x", "data.paths=[", "eval.benchmarks.0.dataset=x", "training.seed=-1"
    )
    assert found == [
        "--set nonsense: expected KEY=VALUE, such as training.max_epochs=3",
        "--set =3: expected KEY=VALUE, such as training.max_epochs=3",
        "--set data.=x: expected KEY=VALUE, such as training.max_epochs=3",
        "--set data.paths: the value '[' is not valid YAML; quote it",
        "--set eval.benchmarks.0.dataset: the config holds no list with an item 0 here; "
        "write the list in the file",
        "--set training.seed: must be at least 0, not -1",
    ]


def test_a_rule_of_a_section_is_blamed_on_the_override_that_broke_it(write: Write) -> None:
    path = write("model:\n  hidden_dim: 512\n  num_heads: 8\n")
    assert problems(path, "model.num_heads=7") == [
        "--set model.num_heads: model: hidden_dim (512) must be divisible by num_heads (7)"
    ]


def test_an_override_that_makes_an_incomplete_section(write: Write) -> None:
    path = write("data: {source: local}")
    assert problems(path, "data.preprocessing.hvg.flavor=seurat", "data.layer=x") == [
        "--set data.preprocessing.hvg.flavor: data.preprocessing.hvg.n_top_genes: is required"
    ]


def test_a_dictionary_is_read_like_a_file_and_left_alone() -> None:
    values = {"training": {"max_epochs": 2}}
    assert parse_config(values, ["training.max_epochs=3"]).training.max_epochs == 3
    assert values == {"training": {"max_epochs": 2}}
    with pytest.raises(ConfigError, match=r"config: model\.num_heads: must be at least 1, not 0"):
        parse_config({"model": {"num_heads": 0}})
    with pytest.raises(ConfigError, match="keys should be strings"):
        parse_config({1: 2})


# --- what is wrong --------------------------------------------------------------------------------


def test_everything_wrong_is_listed_at_once_in_the_order_of_the_file(write: Write) -> None:
    path = write(
        "data:\n"
        "  paths: [missing.h5ad]\n"
        "tokenizer:\n"
        "  masking:\n"
        "    mask_ratio: 1.2\n"
        "    random_share: 0.9\n"
        "model:\n"
        "  hidden_dim: 500\n"
        "  hiden_dim: 512\n"
        "training:\n"
        "  max_epochs: eight\n"
        "  max_epochs: 9\n"
    )
    found = problems(path, "training.seed=x", require_data=True)
    assert found == [
        f"c.yaml:2: data.paths: the file 'missing.h5ad' does not exist (working folder: {Path.cwd()})",
        "c.yaml:5: tokenizer.masking.mask_ratio: must be less than 1, not 1.2",
        "c.yaml:6: tokenizer.masking: mask_token_share (0.8) and random_share (0.9) add up to more than 1",
        "c.yaml:8: model: hidden_dim (500) must be divisible by num_heads (8)",
        "c.yaml:9: model.hiden_dim: is unknown; did you mean model.hidden_dim?",
        "c.yaml:12: training.max_epochs: is written twice, first in line 11",
        "--set training.seed: must be a whole number, not 'x'",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layers: 2.5}", "model.num_layers: must be a whole number, not 2.5"),
        ("model: {num_layers: yes}", "model.num_layers: must be a whole number, not 'true'"),
        ("model: {num_layers: }", "model.num_layers: must be a whole number, not null"),
        ("model: {num_layers: [2]}", "model.num_layers: must be a whole number, not [2]"),
        ("model: {num_layers: 0}", "model.num_layers: must be at least 1, not 0"),
        ("model: {ffn_dim: a}", "model.ffn_dim: must be a whole number, not 'a'"),
        ("model: {dropout: x}", "model.dropout: must be a number, not 'x'"),
        ("model: {dropout: .nan}", "model.dropout: must be a finite number, not NaN"),
        ("training: {optimizer: {lr: .inf}}", "training.optimizer.lr: must be a finite number, not Infinity"),
        ("training: {optimizer: {lr: 0}}", "training.optimizer.lr: must be greater than 0, not 0"),
        ("data: {min_gene_overlap: 2}", "data.min_gene_overlap: must be at most 1, not 2"),
        ("data: {layer: 3}", "data.layer: must be text, not 3; put it in quotes"),
        ("data: {layer: no}", "data.layer: must be text, not false; put it in quotes"),
        ("data: {paths: a.h5ad}", "data.paths: must be a list, not 'a.h5ad'; write [a.h5ad]"),
        ("data: {paths: {a: b}}", 'data.paths: must be a list, not {"a": "b"}'),
        ("data: {preprocessing: {log1p: 3}}", "data.preprocessing.log1p: must be true or false, not 3"),
        ("data: {preprocessing: {log1p: x}}", "data.preprocessing.log1p: must be true or false, not 'x'"),
        (
            "data: {preprocessing: {normalize: cpm}}",
            "data.preprocessing.normalize: must be 'library_size' or 'none', not 'cpm'",
        ),
        ("data: {preprocessing: {hvg: {}}}", "data.preprocessing.hvg.n_top_genes: is required"),
        ("training: 3", "training: must be a section, that is keys and values indented below it, not 3"),
        (
            "training: {optimizer: {betas: [0.9, 0.99, 0.999]}}",
            "training.optimizer.betas: must have at most 2 values, not [0.9, 0.99, 0.999]",
        ),
        ("training: {optimizer: {betas: [0.9]}}", "training.optimizer.betas.1: is required"),
        ("training: {optimizer: {betas: [0.9, x]}}", "training.optimizer.betas.1: must be a number, not 'x'"),
        (
            "training: {optimizer: {betas: [0.9, 2]}}",
            "training.optimizer: betas must lie in [0, 1), not [0.9, 2.0]",
        ),
        (
            "eval: {benchmarks: [{name: scib}]}",
            "must be one of 'linear_probe', 'knn_annotation', 'embedding_quality', ",
        ),
        ("eval: {benchmarks: [{name: linear_prob}]}", "not 'linear_prob'; did you mean linear_probe?"),
        ("eval: {baselines: [pcaa]}", "not 'pcaa'; did you mean pca?"),
        ("eval: {benchmarks: [{dataset: x}]}", "eval.benchmarks.0: needs a key 'name' that says what it is"),
        (
            "eval: {benchmarks: [linear_probe]}",
            "eval.benchmarks.0: must be a section, that is keys and values indented below it, not 'linear_",
        ),
        (
            "tokenizer: {strategy: rank_valeu}",
            "the tokenizer strategy 'rank_valeu' does not exist in this version. Did you mean 'rank_value'?",
        ),
        ("finetune: {freeze_backbone: true, lora: {enabled: true}}", "exclude each other"),
        ("1: 2", "1: is unknown"),
        ("yes: 2", "yes: is unknown"),
    ],
)
def test_wrong_values_in_plain_words(write: Write, text: str, message: str) -> None:
    (found,) = problems(write("# a comment\n" + text))
    assert found.startswith("c.yaml:2: ")
    assert message in found


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("data.val_split", "data.split.val_split"),
        ("model.hiden_dim", "model.hidden_dim"),
        ("model.mask_ratio", "tokenizer.masking.mask_ratio"),
        ("training.lr", "training.optimizer.lr"),
        ("training.warmup_steps", "training.scheduler.warmup_steps"),
        ("train.seed", "training"),
        ("lora.rank", "finetune.lora"),
        ("training.gpus", "training.num_gpus"),
        ("training.optimizer.weight_dacay", "training.optimizer.weight_decay"),
        ("model.dropuot", "model.dropout"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, meant: str) -> None:
    (found,) = problems(None, f"{key}=1")
    assert found.endswith(f"is unknown; did you mean {meant}?")


def test_an_unknown_key_in_a_list_keeps_its_place(write: Write) -> None:
    path = write("eval:\n  benchmarks:\n    - name: linear_probe\n      params:\n        celltype_key: x\n")
    assert problems(path) == [
        "c.yaml:5: eval.benchmarks.0.params.celltype_key: is unknown; "
        "did you mean eval.benchmarks.0.params.cell_type_key?"
    ]


def test_a_key_like_no_other_is_told_what_is_known_there(write: Write) -> None:
    (found,) = problems(write("tokenizer:\n  masking:\n    zzz: 1\n"))
    assert found == (
        "c.yaml:3: tokenizer.masking.zzz: is unknown; "
        "known here: mask_ratio, mask_token_share, random_share, reference"
    )


def test_awkward_unknown_keys_are_only_unknown(write: Write) -> None:
    (unknown, rule) = problems(write("model:\n  'a(': 1\n  hidden_dim: 500\n"))
    assert unknown.startswith("c.yaml:2: model.a(: is unknown")
    assert rule == "c.yaml:3: model: hidden_dim (500) must be divisible by num_heads (8)"


def test_what_follows_from_a_listed_problem_is_not_listed(write: Write) -> None:
    assert problems(write("model:\n  hidden_dim: abc\n  num_heads: 7\n")) == [
        "c.yaml:2: model.hidden_dim: must be a whole number, not 'abc'"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: the file is empty. Its sections can be: data, tokenizer, "),
        ("# only a comment\n", "c.yaml: the file is empty."),
        ("- a\n- b\n", "c.yaml:1: expected sections such as 'data:' with keys below them, not"),
        ("just text", "c.yaml:1: expected sections such as 'data:'"),
        ("data:\n\tsource: local\n", "c.yaml:2: this is not valid YAML: a tab; YAML is indented with spaces"),
        ("data:\n  source: local\n\tlayer: x\n", "c.yaml:3: this is not valid YAML: a tab"),
        ("data: source: local", "c.yaml:1: this is not valid YAML: a colon where none can be"),
        ("data: {}\n---\nmodel: {}\n", "c.yaml:2: this is not valid YAML: a second document ('---')"),
        ("data: [1,\n", "this is not valid YAML: "),
        ("data: *missing", "c.yaml:1: this is not valid YAML: found undefined alias"),
        (
            "data: !!python/object:os.system {}",
            "c.yaml:1: this is not valid YAML: could not determine a cons",
        ),
        ("data: \x00", "c.yaml:1: this is not valid YAML: a control character"),
        ("data: !!bool perhaps", "c.yaml: holds a value that YAML cannot read"),
        ("? [a]\n: b", "c.yaml:1: this is not valid YAML: found unhashable key"),
        (b"data:\n  layer: caf\xe9\n", "c.yaml:2: the file is not UTF-8 text"),
    ],
)
def test_broken_files(write: Write, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'.*nope.yaml' does not exist .*\n.*scmodelforge init"):
        load_config(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match="is a folder; --config needs a YAML file"):
        load_config(tmp_path)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [*Config.model_fields, "optimizer", "betas", "name", "params", "hvg", "benchmarks"]
                ),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    ),
    st.lists(st.text(max_size=12) | st.sampled_from(["data.paths=[", "model=3", "eval.benchmarks=[{}]"])),
)
def test_whatever_a_mapping_holds_it_loads_or_is_a_config_error(values: object, overrides: list[str]) -> None:
    values = values if isinstance(values, dict) else {"data": values, "eval": {"benchmarks": values}}
    with contextlib.suppress(ConfigError):
        assert isinstance(parse_config(values, overrides), Config)


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"%#,?\n\t 01.~<=\x00"), max_size=30)
    | st.binary(max_size=20)
)
def test_whatever_a_file_holds_it_loads_or_is_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, content: str | bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with contextlib.suppress(ConfigError):
        assert isinstance(load_config(path), Config)


# --- paths ----------------------------------------------------------------------------------------


def test_patterns_and_home_are_expanded_in_order(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("data: {paths: ['~/z.h5ad', 'd/*.h5ad'], gene_vocab: ~/z.h5ad}")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("d").mkdir()
    for name in ("z.h5ad", "d/b.h5ad", "d/a.h5ad"):
        Path(name).touch()
    config = load_config(path, require_data=True)
    assert config.data.paths == [str(Path.cwd() / "z.h5ad"), "d/a.h5ad", "d/b.h5ad"]
    assert config.data.gene_vocab == str(Path.cwd() / "z.h5ad")
    assert config.data.model_fields_set == {"paths", "gene_vocab"}
    assert check_paths(config) == config


def test_a_file_whose_name_looks_like_a_pattern(write: Write) -> None:
    path = write("data: {paths: ['cells[1].h5ad']}")
    Path("cells[1].h5ad").touch()
    assert load_config(path, require_data=True).data.paths == ["cells[1].h5ad"]


def test_paths_that_lead_nowhere(write: Write) -> None:
    path = write(
        "data:\n"
        "  paths:\n"
        "    - a.h5ad\n"
        "    - gone.h5ad\n"
        "    - gone/*.h5ad\n"
        "    - folder\n"
        "    - './[a].h5ad'\n"
        "  gene_vocab: human_protien_coding\n"
        "tokenizer:\n"
        "  gene_medians: medians.csv\n"
    )
    Path("a.h5ad").touch()
    Path("folder").mkdir()
    here = f"(working folder: {Path.cwd()})"
    assert problems(path, require_data=True) == [
        f"c.yaml:4: data.paths: the file 'gone.h5ad' does not exist {here}",
        f"c.yaml:5: data.paths: the pattern 'gone/*.h5ad' matches no file {here}",
        "c.yaml:6: data.paths: 'folder' is a folder without manifest.json, so not of shards; name its files, "
        "for example folder/*.h5ad",
        "c.yaml:7: data.paths: './a.h5ad' is listed twice, so its cells would count twice",
        "c.yaml:8: data.gene_vocab: there is no file 'human_protien_coding'; "
        "did you mean human_protein_coding?",
        "c.yaml:10: tokenizer.gene_medians: there is no file 'medians.csv'; names are from_data, none",
    ]
    assert load_config(path).data.gene_vocab == "human_protien_coding"  # only training needs the files


def test_data_are_required_where_asked(write: Write) -> None:
    assert problems(write("data:\n  layer: x\n"), require_data=True) == [
        "c.yaml:1: data.paths: at least one .h5ad file is required"
    ]
    with pytest.raises(ConfigError, match=r"data\.paths: at least one \.h5ad file is required"):
        check_paths(Config())


def test_a_section_that_only_an_override_names_is_its_mistake(write: Write) -> None:
    path = write("training: {seed: 1}\n")
    said = "--set trainin.max_epochs: trainin: is unknown; did you mean training?"
    assert problems(path, "trainin.max_epochs=3") == [said]
    assert problems(None, "trainin.max_epochs=3") == [said]
    path = write("trainin: {seed: 1}\n")
    assert problems(path, "trainin.max_epochs=3") == ["c.yaml:1: trainin: is unknown; did you mean training?"]


# --- sections -------------------------------------------------------------------------------------


def test_a_section_that_an_override_names_in_vain_is_said_and_a_shared_file_is_not(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write("training: {seed: 1}\nmodel: {num_heads: 8}\n")
    load_config(path, ["finetune.label_key=x"], sections={"model", "eval"})
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "--set: not used by this command: finetune."),
    ]
