"""A model takes new genes: what it knew stays bit for bit, what is new starts near the mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse

from scmodelforge.config import Config
from scmodelforge.errors import ConfigError, DataError, ModelError
from scmodelforge.finetuning.run import finetune
from scmodelforge.inference import embed
from scmodelforge.models.bundle import ModelBundle, build_model, load_model
from scmodelforge.models.extension import extend_vocabulary
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.training.run import train
from tests.helpers import finetune_config, make_cells, make_vocab, marker_cells, tiny_config

HUMAN = ["ENSG00000141510", "ENSG00000012048"]  # TP53 and BRCA1, which are in the gene table
NEW = ["ENSG00000012048", "ENSG00000141510", "ENSMUSG00000059552", "Spike-1"]


def more_cells(n_cells: int = 120) -> ad.AnnData:
    """`marker_cells` with four more genes: two of human by version and symbol, one of mouse, one unknown."""
    cells = marker_cells(n_cells, seed=3)
    counts = np.random.default_rng(4).poisson(3.0, (n_cells, 4)).astype(np.float32)
    extra = ad.AnnData(counts)
    extra.var_names = [f"{HUMAN[0]}.5", HUMAN[1], "ENSMUSG00000059552", "Spike-1"]
    extra.obs_names = cells.obs_names
    both = ad.concat([cells, extra], axis=1)
    both.obs = cells.obs
    both.X = sparse.csr_matrix(both.X)
    return both


def continued(run_dir: Path, how: str | None = "mean", **training: object) -> Config:
    settings = finetune_config(run_dir, training={"max_epochs": 1, "optimizer": {"lr": 1e-3}} | training)
    tree = settings.model_dump(include={"training"}) | {"data": {"extend_vocab": how}}
    return Config.model_validate(tree)


def test_genes_are_added_and_what_was_known_stays(pretrained) -> None:
    before = pretrained.model
    config = Config.model_validate({"data": {"extend_vocab": "mean"}})
    after = extend_vocabulary(before, [more_cells()], config)
    assert list(after.vocab.gene_ids) == [*before.vocab.gene_ids, *NEW]
    assert list(after.vocab.symbols[-4:]) == ["BRCA1", "TP53", "Trp53", "Spike-1"]
    assert after.vocab.fingerprint != before.vocab.fingerprint
    assert np.isnan(after.vocab.medians[-4:]).all()
    np.testing.assert_array_equal(after.vocab.medians[:-4], before.vocab.medians)
    grown = 0
    for name, tensor in before.model.state_dict().items():
        new = after.model.state_dict()[name]
        assert torch.equal(new[: len(tensor)], tensor), name
        if len(new) > len(tensor):
            grown += 1
            genes = tensor[before.vocab.first_gene_token :]
            away = (new[len(tensor) :] - genes.mean(0)).abs() / genes.std(0)
            assert away.max() < 0.5
            assert len(new[len(tensor) :].unique(dim=0)) == 4
    assert grown == 2  # embedding, and the bias of the tied head
    again = extend_vocabulary(before, [more_cells()], config)
    assert all(map(torch.equal, after.model.state_dict().values(), again.model.state_dict().values()))


def test_known_genes_alone_change_nothing_and_null_adds_none(pretrained) -> None:
    config = Config.model_validate({"data": {"extend_vocab": "mean"}})
    assert extend_vocabulary(pretrained.model, [marker_cells(20)], config) is pretrained.model
    assert extend_vocabulary(pretrained.model, [more_cells(20)], Config()) is pretrained.model


def test_the_same_cells_get_the_same_outputs(pretrained) -> None:
    """Cells without a new gene are tokenized and embedded as before."""
    after = extend_vocabulary(
        pretrained.model, [more_cells()], Config.model_validate({"data": {"extend_vocab": "mean"}})
    )
    cells = make_cells(marker_cells(8, seed=9).X.toarray())
    embeddings = [
        bundle.model.encode(build_tokenizer(bundle.config, bundle.vocab)(cells))
        for bundle in (pretrained.model, after)
    ]
    assert torch.equal(*embeddings)


FAMILIES = {
    "ranks, own output": {"model": {"gene_head": "mlp"}},
    "bins": {
        "tokenizer": {"strategy": "binned_expression", "gene_medians": "none"},
        "model": {"pretraining_task": "dual_prediction"},
    },
    "counts, given vectors": {
        "data": {"preprocessing": {"normalize": "none", "log1p": False}},
        "tokenizer": {
            "strategy": "continuous_projection",
            "vocab_layout": "transcriptformer",
            "max_value": 30,
        },
        "model": {
            "architecture": "autoregressive_transformer",
            "pretraining_task": "dual_prediction",
            "count_bias": True,
            "gene_embedding_dim": 6,
            "gene_head": "mlp",
        },
    },
    "autoencoder": {
        "tokenizer": {"strategy": "continuous_projection"},
        "model": {"architecture": "masked_autoencoder", "pretraining_task": "expression_reconstruction"},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_grows(family: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **FAMILIES[family])
    vocab = make_vocab(40, layout=config.tokenizer.vocab_layout)
    bundle = ModelBundle(config, vocab, build_model(config, vocab, seed=0))
    after = extend_vocabulary(
        bundle, [more_cells(20)], Config.model_validate({"data": {"extend_vocab": "mean"}})
    )
    changed = 0
    for name, tensor in bundle.model.state_dict().items():
        new = after.model.state_dict()[name]
        assert torch.equal(new[: len(tensor)], tensor), name
        changed += len(new) == len(tensor) + 4
    assert changed >= 1
    assert after.vocab.n_genes == 44
    frozen = {name for name, p in bundle.model.named_parameters() if not p.requires_grad}
    assert {name for name, p in after.model.named_parameters() if not p.requires_grad} == frozen


def test_vectors_of_a_file_are_taken(pretrained, tmp_path: Path) -> None:
    width = pretrained.model.config.model.hidden_dim
    vectors = np.arange(2 * width, dtype=np.float32).reshape(2, width)
    np.savez(tmp_path / "v.npz", embeddings=vectors, gene_ids=np.array(HUMAN))
    config = Config.model_validate({"data": {"extend_vocab": str(tmp_path / "v.npz")}})
    table = extend_vocabulary(pretrained.model, [more_cells()], config).model.embedding.tokens.weight
    np.testing.assert_array_equal(table[-4:-2].detach(), vectors[::-1])
    assert table[-2:].abs().max() < 1
    np.savez(tmp_path / "v.npz", embeddings=vectors[:, 1:], gene_ids=np.array(HUMAN))
    with pytest.raises(ConfigError, match="have 15 numbers, and the gene embeddings of the model 16"):
        extend_vocabulary(pretrained.model, [more_cells()], config)


def test_training_goes_on_with_new_genes(pretrained, tmp_path: Path) -> None:
    start = pretrained.run_dir / "model"
    result = train(continued(tmp_path / "run", max_epochs=2), data=more_cells(), checkpoint=start)
    bundle = load_model(result.run_dir / "model")
    assert list(bundle.vocab.gene_ids[-4:]) == NEW
    assert np.isfinite(bundle.vocab.medians[-4:]).all()
    np.testing.assert_array_equal(bundle.vocab.medians[:-4], pretrained.model.vocab.medians)
    assert np.isfinite(result.metrics["val_loss"])
    embedded = embed(more_cells(10), bundle)
    assert embedded.obsm["X_scmodelforge"].shape == (10, 16)

    resumed = train(
        continued(tmp_path / "run", max_epochs=3),
        data=more_cells(),
        checkpoint=start,
        resume=result.checkpoint_dir / "last.ckpt",
    )
    assert resumed.model.vocab.fingerprint == bundle.vocab.fingerprint
    with pytest.raises(ModelError, match=r"extend_vocab|vocabulary"):
        train(
            continued(tmp_path / "run", None, max_epochs=3),
            data=more_cells(),
            checkpoint=start,
            resume=result.checkpoint_dir / "last.ckpt",
        )


def test_a_resumed_run_ends_as_one_that_was_never_stopped(pretrained, tmp_path: Path) -> None:
    start = pretrained.run_dir / "model"
    steps = {"checkpoint_every_n_steps": 1, "scheduler": {"name": "constant"}}
    whole = train(continued(tmp_path / "a", max_epochs=2, **steps), data=more_cells(), checkpoint=start)
    half = train(continued(tmp_path / "b", max_epochs=1, **steps), data=more_cells(), checkpoint=start)
    rest = train(
        continued(tmp_path / "b", max_epochs=2, **steps),
        data=more_cells(),
        checkpoint=start,
        resume=half.checkpoint_dir / "last.ckpt",
    )
    ends = [load_model(run.checkpoint_dir / "last.ckpt").model.state_dict() for run in (whole, rest)]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_fine_tuning_takes_new_genes_too(pretrained, tmp_path: Path) -> None:
    config = finetune_config(tmp_path / "run", training={"max_epochs": 1})
    config = config.model_copy(update={"data": config.data.model_copy(update={"extend_vocab": "mean"})})
    result = finetune(config, pretrained.run_dir / "model", data=more_cells())
    assert list(result.model.vocab.gene_ids[-4:]) == NEW
    assert np.isfinite(result.model.vocab.medians[-4:]).all()
    assert result.model.labels.classes == ("B", "NK", "T")


def test_training_without_steps_worth_of_change_starts_at_the_model(pretrained, tmp_path: Path) -> None:
    """With a learning rate near zero the model that continued training leaves is the one it started from."""
    config = continued(tmp_path / "run", None, max_steps=1, optimizer={"lr": 1e-12, "weight_decay": 0})
    result = train(config, data=marker_cells(), checkpoint=pretrained.run_dir / "model")
    for name, tensor in pretrained.model.model.state_dict().items():
        torch.testing.assert_close(result.model.model.state_dict()[name], tensor, atol=1e-9, rtol=0)


def test_contradictions_are_refused(pretrained, annotator, tmp_path: Path) -> None:
    start = pretrained.run_dir / "model"
    with pytest.raises(ModelError, match=r"model\.num_layers: 3 in the config, 2 in the model"):
        train(Config.model_validate({"model": {"num_layers": 3}}), data=marker_cells(), checkpoint=start)
    with pytest.raises(ConfigError, match="--checkpoint"):
        train(continued(tmp_path / "run"), data=marker_cells())
    with pytest.raises(ModelError, match="does not exist"):
        train(continued(tmp_path / "run"), data=marker_cells(), checkpoint=tmp_path / "nothing.ckpt")
    selected = pretrained.model.config.data.preprocessing.model_copy(update={"hvg": {"n_top_genes": 5}})
    data = pretrained.model.config.data.model_copy(update={"preprocessing": selected})
    bundle = replace(pretrained.model, config=pretrained.model.config.model_copy(update={"data": data}))
    with pytest.raises(ConfigError, match="hvg"):
        extend_vocabulary(bundle, [more_cells(20)], continued(tmp_path / "run"))
    with pytest.raises(DataError, match="no file"):
        extend_vocabulary(pretrained.model, [more_cells(20)], continued(tmp_path, str(tmp_path / "no.npz")))
    assert not (tmp_path / "run").exists()
