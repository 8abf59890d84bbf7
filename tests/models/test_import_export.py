"""Published folders become models of ours and are written again; what does not fit is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from scmodelforge.errors import ModelError, UserError
from scmodelforge.models.bundle import load_model, save_bundle
from scmodelforge.models.published import export_model, import_model
from scmodelforge.models.published.geneformer import TOKEN_TYPES
from scmodelforge.models.published.reading import read_pickle, read_weights
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import make_cells, marker_cells
from tests.journeys.command import done, refused, sets
from tests.models.published_files import GENES, SPECIALS, geneformer_folder, preset_folder

transformers = pytest.importorskip("transformers", reason="needs the dev extra (transformers)")

COUNTS = marker_cells(6, seed=5).X.toarray()
RANKS = "bert.embeddings.position_embeddings.weight"


def bert_logits(bert: torch.nn.Module, tokens: TokenBatch) -> torch.Tensor:
    with torch.no_grad():
        logits = bert(tokens.input_ids, attention_mask=tokens.attention_mask.long()).logits
    return logits[tokens.attention_mask]


def our_logits(bundle, tokens: TokenBatch) -> torch.Tensor:
    with torch.no_grad():
        hidden = bundle.model(tokens)
        return bundle.model.head(hidden, bundle.model.embedding.tokens).logits[tokens.attention_mask]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_geneformer_says_what_bert_says(tmp_path: Path, version: str, weights: str) -> None:
    bert = geneformer_folder(tmp_path / "published", version, weights=weights)
    bundle = import_model("geneformer", tmp_path / "published")
    vocab, config = bundle.vocab, bundle.config
    assert list(vocab.special_tokens) == SPECIALS[version]
    assert list(vocab.gene_ids) == GENES
    assert vocab.first_gene_token == len(SPECIALS[version])
    np.testing.assert_array_equal(vocab.medians, 0.5 + np.arange(40) / 10)
    assert set(vocab.symbols[:2]) <= {"SYM0", "SYM1", "TSPAN6", "TNMD"}
    assert vocab.species == "human"
    assert config.tokenizer.prepend_cls is config.tokenizer.append_eos is (version == "v2")
    assert config.tokenizer.masking.mask_ratio == 0.15
    assert config.model.pooling == ("cls" if version == "v2" else "mean")
    assert not bundle.model.training
    tokens = build_tokenizer(config, vocab)(make_cells(COUNTS))
    torch.testing.assert_close(our_logits(bundle, tokens), bert_logits(bert, tokens), atol=1e-5, rtol=1e-5)


def test_dictionaries_may_lie_elsewhere_and_must_be_unique(tmp_path: Path) -> None:
    there = tmp_path / "dictionaries"
    geneformer_folder(tmp_path / "published", dictionaries=there)
    with pytest.raises(ModelError, match="--dictionaries"):
        import_model("geneformer", tmp_path / "published")
    assert import_model("geneformer", tmp_path / "published", there).vocab.n_genes == 40
    (there / "token_dictionary_gc30M.pkl").write_bytes((there / "token_dictionary_gc104M.pkl").read_bytes())
    with pytest.raises(ModelError, match="holds several"):
        import_model("geneformer", tmp_path / "published", there)


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    bert = geneformer_folder(tmp_path / "published")
    bundle = import_model("geneformer", tmp_path / "published")
    return export_model(bundle, "huggingface-bert", tmp_path / "exported"), bert


def test_transformers_reads_what_is_exported(exported, tmp_path: Path) -> None:
    folder, bert = exported
    back, info = transformers.BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    bundle = import_model("geneformer", tmp_path / "published")
    tokens = build_tokenizer(bundle.config, bundle.vocab)(make_cells(COUNTS))
    torch.testing.assert_close(
        bert_logits(back.eval(), tokens), bert_logits(bert, tokens), atol=1e-5, rtol=1e-5
    )
    table = json.loads((folder / "token_dictionary.json").read_text())
    assert table == {name: token for token, name in enumerate([*SPECIALS["v2"], *GENES])}


def test_every_tensor_makes_the_round_trip(exported, tmp_path: Path) -> None:
    """All but the token types, which are folded into the ranks: those are the sum of the two."""
    folder, _ = exported
    before = load_file(tmp_path / "published" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before.keys() - {RANKS, TOKEN_TYPES}:
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(after[RANKS], before[RANKS] + before[TOKEN_TYPES][0])
    assert not after[TOKEN_TYPES].any()
    again = export_model(import_model("geneformer", folder), "huggingface-bert", tmp_path / "again")
    for file in sorted(path.name for path in folder.iterdir()):
        assert (folder / file).read_bytes() == (again / file).read_bytes(), file


def test_a_saved_import_is_the_same_model(tmp_path: Path) -> None:
    geneformer_folder(tmp_path / "published")
    bundle = import_model("geneformer", tmp_path / "published")
    loaded = load_model(save_bundle(bundle, tmp_path / "model"))
    assert loaded.config == bundle.config
    assert loaded.vocab.fingerprint == bundle.vocab.fingerprint
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])


def changed_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_a_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["bert.encoder.layer.1.output.dense.bias"]
    save_file(state, folder / "model.safetensors")


def untied(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"] + 1
    save_file(state, folder / "model.safetensors")


def dictionary(folder: Path, stem: str, **changes: object) -> None:
    path = folder / f"{stem}_gc104M.pkl"
    path.write_bytes(pickle.dumps(read_pickle(path) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_tensor, r"missing: \['bert.encoder.layer.1.output.dense.bias'\]"),
        (untied, "is not equal"),
        (lambda f: changed_json(f / "config.json", num_hidden_layers=1), "left over"),
        (lambda f: changed_json(f / "config.json", intermediate_size=32), "shape"),
        (lambda f: changed_json(f / "config.json", hidden_act="silu"), "silu"),
        (lambda f: changed_json(f / "config.json", position_embedding_type="relative_key"), "relative_key"),
        (
            lambda f: changed_json(f / "config.json", architectures=["BertForSequenceClassification"]),
            "fine-tuned",
        ),
        (lambda f: changed_json(f / "config.json", vocab_size=99), "different models"),
        (lambda f: changed_json(f / "config.json", num_attention_heads=3), "divisible"),
        (
            lambda f: (f / "token_dictionary_gc104M.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR."),
            "os.system",
        ),
        (lambda f: changed_json(f / "config.json", model_type="llama"), "BERT"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "safetensors"),
        (lambda f: (f / "gene_median_dictionary_gc104M.pkl").unlink(), "medians"),
        (lambda f: dictionary(f, "token_dictionary", ENSGX=99), "without gaps"),
        (lambda f: dictionary(f, "token_dictionary", **{"<odd>": 44}), "special tokens"),
        (lambda f: dictionary(f, "gene_median_dictionary", ENSG00000000003=0.0), "positive"),
        (lambda f: dictionary(f, "gene_median_dictionary", ENSG00000000003="x"), "number"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_and_nothing_written(
    tmp_path: Path, damage, message: str
) -> None:
    geneformer_folder(tmp_path / "published")
    damage(tmp_path / "published")
    with pytest.raises(ModelError, match=message):
        import_model("geneformer", tmp_path / "published")
    refused("import", "--from", "geneformer", tmp_path / "published", "--output", tmp_path / "new", words=())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published"]


def test_a_folder_of_another_family_is_recognised(tmp_path: Path) -> None:
    geneformer_folder(tmp_path / "published")
    scgpt = tmp_path / "scgpt"
    scgpt.mkdir()
    for name in ("args.json", "vocab.json"):
        (scgpt / name).write_text("{}")
    ours = save_bundle(import_model("geneformer", tmp_path / "published"), tmp_path / "ours")
    for folder, family, words in (
        (scgpt, "geneformer", "scGPT"),
        (tmp_path / "published", "scgpt", "BERT"),
        (tmp_path / "published", "transcriptformer", "--from geneformer"),
        (ours, "geneformer", "needs no import"),
        (tmp_path / "missing", "geneformer", "not a folder"),
        (scgpt, "scvi", "geneformer, scgpt, transcriptformer"),
    ):
        with pytest.raises(UserError, match=words):
            import_model(family, folder)


def test_the_commands_import_and_export(tmp_path: Path) -> None:
    geneformer_folder(tmp_path / "published")
    model, out = tmp_path / "model", tmp_path / "out"
    answer = done("import", "--from", "geneformer", tmp_path / "published", "--output", model)
    assert "40 genes" in answer.out
    assert f"{load_model(model).n_parameters:,} parameters" in answer.out
    done("export", "--model", model, "--to", "huggingface-bert", out)
    assert (out / "model.safetensors").is_file()
    refused("export", "--model", model, "--to", "huggingface-bert", out, words=("not empty",))
    refused("export", "--model", model, "--to", "onnx", tmp_path / "x", words=("huggingface-bert",))
    refused("import", "--from", "geneformer", tmp_path / "published", "--output", model, words=("not empty",))


def test_a_model_that_is_no_bert_is_not_exported(pretrained, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.norm is 'pre', not 'post'"):
        export_model(pretrained.model, "huggingface-bert", tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module", params=["geneformer", "scgpt", "transcriptformer"])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a tiny model of each family."""
    folder = tmp_path_factory.mktemp("imported")
    if request.param == "geneformer":
        geneformer_folder(folder / "published")
    elif request.param == "scgpt":
        preset_folder(folder / "published", "scgpt-human")
    else:
        preset_folder(folder / "published", "transcriptformer-sapiens", gene_embedding_dim=6)
    return save_bundle(import_model(request.param, folder / "published"), folder / "model")


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    path = tmp_path / "cells.h5ad"
    marker_cells(90).write_h5ad(path)
    return path


def config_file(path: Path, cells: Path, **training: object) -> Path:
    settings = {
        "data": {"paths": [str(cells)], "split": {"val_split": 0.25}},
        "training": {
            "max_epochs": 1,
            "num_gpus": 0,
            "batch_size": 30,
            "run_dir": str(path.parent / path.stem),
        }
        | training,
        "eval": {"benchmarks": [{"name": "linear_probe", "params": {"n_splits": 1}}]},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_an_import_is_embedded_and_benchmarked(imported: Path, cells: Path, tmp_path: Path) -> None:
    done("embed", "--model", imported, "--data", cells, "--output", tmp_path / "out.h5ad")
    config = config_file(tmp_path / "run.yaml", cells)
    answer = done("benchmark", "--config", config, "--model", imported, "--data", cells)
    assert "untrained" in answer.out


def test_an_import_is_fine_tuned_and_annotates(imported: Path, cells: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "run.yaml", cells)
    done("finetune", "--config", config, "--checkpoint", imported)
    model = tmp_path / "run" / "model"
    done("annotate", "--model", model, "--data", cells, "--output", tmp_path / "out.h5ad")


def test_training_goes_on_from_an_import(imported: Path, cells: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "run.yaml", cells)
    again = ("train", "--config", config, "--checkpoint", imported)
    done(*again)
    model = load_model(tmp_path / "run" / "model")
    assert model.vocab.fingerprint == load_model(imported).vocab.fingerprint
    done(*again, "--set", "training.max_epochs=2", "--resume", tmp_path / "run" / "checkpoints" / "last.ckpt")
    refused(*again, "--set", "model.num_layers=5", words=("model.num_layers",))


def test_a_fine_tuned_import_goes_back_without_its_head(annotator, tmp_path: Path) -> None:
    geneformer_folder(tmp_path / "published")
    bundle = import_model("geneformer", tmp_path / "published")
    tuned = replace(bundle, labels=annotator.model.labels, head=annotator.model.head)
    answer = done(
        "export", "--model", save_bundle(tuned, tmp_path / "m"), "--to", "huggingface-bert", tmp_path / "bert"
    )
    assert "cell_type" in answer.err
    transformers.BertForMaskedLM.from_pretrained(tmp_path / "bert")


@pytest.mark.parametrize("family", ["scgpt", "transcriptformer"])
def test_the_other_families_make_the_round_trip(family: str, tmp_path: Path) -> None:
    preset = {"scgpt": "scgpt-human", "transcriptformer": "transcriptformer-sapiens"}[family]
    preset_folder(tmp_path / "a", preset, **({"gene_embedding_dim": 6} if family != "scgpt" else {}))
    bundle = import_model(family, tmp_path / "a")
    again = import_model(family, export_model(bundle, family, tmp_path / "b"))
    assert again.vocab.fingerprint == bundle.vocab.fingerprint
    assert all(map(torch.equal, bundle.model.state_dict().values(), again.model.state_dict().values()))


@pytest.mark.parametrize(
    ("family", "file", "keys"),
    [
        ("scgpt", "args.json", ("nheads",)),
        ("transcriptformer", "config.json", ("model", "model_config", "num_heads")),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    family: str, file: str, keys: tuple[str, ...], tmp_path: Path
) -> None:
    preset = {"scgpt": "scgpt-human", "transcriptformer": "transcriptformer-sapiens"}[family]
    preset_folder(tmp_path / "a", preset, **({"gene_embedding_dim": 6} if family != "scgpt" else {}))
    path = tmp_path / "a" / file
    settings = part = json.loads(path.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = 7
    path.write_text(json.dumps(settings))
    words = (file, "must be divisible by num_heads (7)")
    refused("import", "--from", family, tmp_path / "a", "--output", tmp_path / "new", words=words)
    assert not (tmp_path / "new").exists()


def _of_weights(name: str, change) -> object:
    def damage(folder: Path) -> None:
        (path,) = (path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors"))
        save, load = (save_file, load_file) if path.suffix == ".safetensors" else (torch.save, read_weights)
        state = load(path)
        save(state | {name: change(state[name])}, path)

    return damage


def _of_settings(*keys: str, value: object) -> object:
    def damage(folder: Path) -> None:
        (path,) = (path for path in folder.glob("*.json") if path.name in ("args.json", "config.json"))
        settings = inner = json.loads(path.read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(settings))

    return damage


TYPES = "bert.embeddings.token_type_embeddings.weight"
QKV = "transformer_encoder.layers.0.self_attn.Wqkv.weight"
AUX = "aux_embeddings.assay.weight"


@pytest.mark.parametrize(
    ("family", "damage", "message"),
    [
        ("geneformer", _of_settings("architectures", value=3), "describes a 3"),
        (
            "geneformer",
            _of_settings("hidden_dropout_prob", value="x"),
            r"model\.dropout: must be a number, not 'x'",
        ),
        ("geneformer", _of_weights(TYPES, lambda t: t.sum()), r"has the shape \(\)"),
        ("geneformer", _of_weights(TYPES, lambda t: t * np.nan), "not finite"),
        ("geneformer", lambda f: (f / "config.json").unlink(), "it has no config.json"),
        ("scgpt", lambda f: (f / "args.json").write_text("[]"), "lacks embsize"),
        ("scgpt", lambda f: torch.save({3: torch.zeros(1)}, f / "best_model.pt"), "no table of tensors"),
        ("scgpt", lambda f: (f / "best_model.pt").write_bytes(b""), "0 bytes.*damaged or was cut off"),
        ("scgpt", _of_weights(QKV, lambda t: t[:-1]), "not three equal parts"),
        ("scgpt", _of_weights("encoder.embedding.weight", torch.sum), "different models"),
        (
            "transcriptformer",
            lambda f: (f / "config.json").write_text('{"model": 3}'),
            "it lacks model_config",
        ),
        ("transcriptformer", _of_settings("model", "data_config", "special_tokens", value=3), r"\(none\)"),
        ("transcriptformer", _of_weights(AUX, torch.sum), "shape"),
        ("transcriptformer", lambda f: shutil.rmtree(f / "vocabs"), "it has no vocabs"),
    ],
)
def test_damage_ends_in_one_message(family: str, damage, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    family = family.replace("transcriptformer", "transcriptformer")
    if family == "geneformer":
        geneformer_folder(folder)
    elif family == "scgpt":
        preset_folder(folder, "scgpt-human")
    else:
        preset_folder(folder, "transcriptformer-sapiens", gene_embedding_dim=6)
    damage(folder)
    with pytest.raises(ModelError, match=message):
        import_model(family, folder)
    refused("import", "--from", family, folder, "--output", tmp_path / "new", words=())
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_published_folder_that_is_not_imported_yet_is_recognised(tmp_path: Path, cells: Path) -> None:
    preset_folder(tmp_path / "published", "scgpt-human")
    embed = ("embed", "--model", tmp_path / "published", "--data", cells, "--output", tmp_path / "e.h5ad")
    refused(*embed, words=("it has no config.yaml", "--from scgpt", "scmodelforge import"))


def test_the_name_of_a_preset_contradicts_no_model(tmp_path: Path, cells: Path) -> None:
    preset_folder(tmp_path / "published", "scgpt-human")
    model = save_bundle(import_model("scgpt", tmp_path / "published"), tmp_path / "model")
    tiny = sets(
        model__preset="scgpt-human",
        tokenizer__max_genes=32,
        model__hidden_dim=16,
        model__num_layers=2,
        model__num_heads=2,
        model__ffn_dim=24,
    )
    done("embed", "--model", model, "--data", cells, "--output", tmp_path / "e.h5ad", *tiny)
