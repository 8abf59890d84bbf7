"""Gene vectors and attention: what the model computes, told by a plain formula and by transformers' BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse

from scmodelforge.errors import DataError, UserError
from scmodelforge.inference import open_for
from scmodelforge.inference_genes import attention, gene_embeddings
from scmodelforge.models.bundle import ModelBundle, build_model
from scmodelforge.models.published import export_model
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.training.run import RunResult
from tests.helpers import make_vocab, marker_cells, tiny_config
from tests.journeys.command import done, refused


def built(**sections: dict[str, Any]) -> ModelBundle:
    """A model with large random weights, so that attention is far from even."""
    config = tiny_config(Path("nowhere"), **sections)
    vocab = make_vocab(40, layout=config.tokenizer.vocab_layout)
    model = build_model(config, vocab, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return ModelBundle(config, vocab, model)


def geneformer() -> ModelBundle:
    return built(model={"norm": "post", "activation": "relu", "hidden_dim": 16})


def tokens_of(bundle: ModelBundle, cells: ad.AnnData) -> TokenBatch:
    store = open_for(bundle, cells)
    return build_tokenizer(bundle.config, bundle.vocab)(store.read(np.arange(store.n_cells)))


def mean_of_pairs(bundle: ModelBundle, tokens: TokenBatch, weights: np.ndarray) -> np.ndarray:
    """Slow twin: mean of weights (n_cells, length, length) over the cells that have both genes; NaN for none."""
    n_genes, first = bundle.vocab.n_genes, bundle.vocab.first_gene_token
    total, n = np.zeros((n_genes, n_genes)), np.zeros((n_genes, n_genes))
    for cell in range(tokens.n_cells):
        ids = tokens.input_ids[cell].tolist()
        for i, gene in enumerate(ids):
            for j, other in enumerate(ids):
                if gene >= first and other >= first:
                    total[gene - first, other - first] += weights[cell, i, j]
                    n[gene - first, other - first] += 1
    with np.errstate(invalid="ignore"):
        return total / n


def dense(result: ad.AnnData, bundle: ModelBundle) -> np.ndarray:
    """X of all genes of the vocabulary, NaN where no cell had the pair."""
    rows = bundle.vocab.to_frame().gene_id.isin(result.obs_names).to_numpy()
    full = np.full((bundle.vocab.n_genes,) * 2, np.nan)
    values = np.where(result.layers["n_cells"].toarray() > 0, result.X.toarray(), np.nan)
    full[np.ix_(rows, rows)] = values
    return full


@pytest.mark.parity
@pytest.mark.parametrize("heads", [None, [1]])
def test_attention_is_bert_s(tmp_path: Path, heads: list[int] | None) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the dev extra (transformers)")
    bundle, cells = geneformer(), marker_cells(12)
    export_model(bundle, "huggingface-bert", tmp_path / "bert")
    bert = transformers.BertModel.from_pretrained(tmp_path / "bert", attn_implementation="eager").eval()
    tokens = tokens_of(bundle, cells)
    with torch.no_grad():
        theirs = bert(tokens.input_ids, attention_mask=tokens.attention_mask.long(), output_attentions=True)
    result = attention(bundle, cells, layers=[1, 2], heads=heads, batch_size=5)
    chosen = slice(None) if heads is None else heads
    expected = [
        mean_of_pairs(bundle, tokens, weights[:, chosen].mean(1).numpy()) for weights in theirs.attentions
    ]
    np.testing.assert_allclose(dense(result, bundle), np.mean(expected, axis=0), atol=1e-5, rtol=0)
    second = ad.AnnData(result.layers["layer_2"], result.obs, result.var, layers=result.layers)
    np.testing.assert_allclose(dense(second, bundle), expected[1], atol=1e-5, rtol=0)
    assert np.nanmax(expected[1]) > 0.3, "these weights are far from even"


CAUSAL: dict[str, dict[str, Any]] = {
    "data": {"preprocessing": {"normalize": "none", "log1p": False}},
    "tokenizer": {"strategy": "continuous_projection"},
    "model": {
        "architecture": "autoregressive_transformer",
        "pretraining_task": "next_gene",
        "count_bias": True,
        "soft_cap": 2.0,
        "qk_norm": True,
    },
}


@pytest.mark.parametrize(
    "sections",
    [{}, {"model": {"qk_norm": True, "soft_cap": 3.0}}, {"model": {"norm": "normed_residual"}}, CAUSAL],
    ids=["pre", "qk-norm and cap", "normed residual", "causal with counts"],
)
def test_attention_mixes_values_to_what_the_model_computes(sections: dict[str, Any]) -> None:
    """Weights times values is what the model's own attention gives, in every kind of model."""
    from scmodelforge.models.attention import attention_weights

    bundle, seen = built(**sections), []
    tokens = bundle.model.readable(tokens_of(bundle, marker_cells(6)))
    layer = bundle.model.transformer.blocks[1].attention
    layer.register_forward_hook(lambda module, given, result: seen.append((given[0], result)))
    with torch.no_grad():
        bundle.model.encode(tokens, "mean")
        ((x, mixed),) = seen
        q, k, v = layer.queries_keys_values(x)
        sequences = bundle.model.sequences_to_embed(tokens)
        ours = torch.zeros_like(v)
        for head in range(layer.num_heads):
            for piece, weights in attention_weights(q, k, sequences, [head], layer.soft_cap):
                ours[piece, head] = weights @ v[piece, head]
        torch.testing.assert_close(layer.out(ours.flatten(1)), mixed, atol=1e-5, rtol=0)


def test_attention_reads_what_the_block_reads() -> None:
    """The exported weights are those of the hooked layer, in a model whose blocks norm first."""
    from scmodelforge.models.attention import attention_weights

    bundle, cells, seen = built(), marker_cells(6), []
    tokens = tokens_of(bundle, cells)
    packed = bundle.model.readable(tokens)
    layer = bundle.model.transformer.blocks[1].attention
    hook = layer.register_forward_hook(lambda module, given, result: seen.append(given[0]))
    with torch.no_grad():
        bundle.model.encode(packed)
        hook.remove()
        q, k, _ = layer.queries_keys_values(seen[0])
        length = tokens.input_ids.shape[1]
        weights = np.zeros((6, length, length))
        pieces = attention_weights(q, k, bundle.model.sequences(packed), range(layer.num_heads))
        for cell, (piece, of_cell) in enumerate(pieces):
            n = piece.stop - piece.start
            weights[cell, :n, :n] = of_cell.numpy()
    expected = mean_of_pairs(bundle, tokens, weights)
    np.testing.assert_allclose(dense(attention(bundle, cells), bundle), expected, atol=1e-6, rtol=0)


def test_genes_and_cells_are_chosen_and_the_result_is_a_file(tmp_path: Path) -> None:
    bundle, cells = geneformer(), marker_cells(30)
    everything = attention(bundle, cells)
    asked = ["G7", "ENSG00000000003"]
    few = attention(bundle, cells, genes=asked)
    assert list(few.obs_names) == ["ENSG00000000007", "ENSG00000000003"]
    assert list(few.obs["symbol"]) == ["G7", "G3"]
    both = everything[few.obs_names, few.var_names]
    np.testing.assert_allclose(few.X.toarray(), both.X.toarray(), atol=1e-6)
    common = attention(bundle, cells, max_genes=5)
    assert set(common.obs["n_cells"]) <= set(sorted(everything.obs["n_cells"])[-5:])
    drawn = attention(bundle, cells, max_cells=3)
    assert drawn.uns["scmodelforge"]["attention"]["n_cells"] == 3
    assert drawn.layers["n_cells"].max() == 3
    everything.write_h5ad(tmp_path / "attention.h5ad")
    read = ad.read_h5ad(tmp_path / "attention.h5ad")
    assert sparse.issparse(read.X)
    assert read.uns["scmodelforge"]["attention"]["model_sha256"] == bundle.sha256()


def test_static_gene_vectors_are_the_model_s_input() -> None:
    bundle = geneformer()
    vectors = gene_embeddings(bundle)
    weight = bundle.model.embedding.tokens.weight[bundle.vocab.first_gene_token :].detach().numpy()
    np.testing.assert_array_equal(vectors.X, weight)
    assert list(vectors.obs_names) == list(bundle.vocab.gene_ids)
    assert list(vectors.obs.columns) == ["symbol", "biotype"]


@pytest.mark.parametrize("layer", [0, 1, None])
def test_contextual_gene_vectors_are_mean_hidden_states(layer: int | None) -> None:
    bundle, cells = geneformer(), marker_cells(20)
    cells = cells[:, :-3].copy()  # so that some genes are in no cell
    tokens = tokens_of(bundle, cells)
    with torch.no_grad():
        hidden = bundle.model.hidden_states(tokens)[-1 if layer is None else layer].numpy()
    vectors = gene_embeddings(bundle, cells, layer=layer, batch_size=7)
    assert vectors.n_obs == 37
    for gene, row in zip(vectors.obs_names, vectors.X, strict=True):
        token = bundle.vocab.index_of()[gene] + bundle.vocab.first_gene_token
        here = tokens.input_ids.numpy() == token
        assert vectors.obs.loc[gene, "n_cells"] == here.sum()
        np.testing.assert_allclose(row, hidden[here].mean(axis=0), atol=1e-5)


def test_the_commands_write_both(pretrained: RunResult, tmp_path: Path) -> None:
    model, cells = pretrained.run_dir / "model", tmp_path / "cells.h5ad"
    marker_cells(30).write_h5ad(cells)
    done("genes", "--model", model, "--output", tmp_path / "static.h5ad")
    said = done("genes", "--model", model, "--data", cells, "--layer", 1, "--output", tmp_path / "mean.h5ad")
    assert "40 genes" in said.out
    static, mean = (ad.read_h5ad(tmp_path / name) for name in ("static.h5ad", "mean.h5ad"))
    assert static.shape == mean.shape == (40, 16)
    options = (
        "--layer",
        1,
        "--layer",
        2,
        "--head",
        0,
        "--gene",
        "ENSG00000000001",
        "--gene",
        "ENSG00000000009",
    )
    done("attention", "--model", model, "--data", cells, *options, "--output", tmp_path / "a.h5ad")
    result = ad.read_h5ad(tmp_path / "a.h5ad")
    assert result.shape == (2, 2)
    assert set(result.layers) == {"n_cells", "layer_1", "layer_2"}
    again = attention(model, marker_cells(30), layers=[1, 2], heads=[0], genes=list(result.obs_names))
    np.testing.assert_allclose(result.X.toarray(), again.X.toarray(), atol=1e-6)
    out = ("--output", tmp_path / "no.h5ad")
    refused("genes", "--model", model, "--layer", 1, *out, words=("needs cells",))
    refused("genes", "--model", model, "--data", cells, "--layer", 3, *out, words=("layer is 3", "to 2"))
    ask = ("attention", "--model", model, "--data", cells)
    refused(*ask, "--layer", 0, *out, words=("no layer 0", "1 to 2"))
    refused(*ask, "--head", 2, *out, words=("no head 2", "0 to 1"))
    refused(*ask, "--gene", "NOSUCH", *out, words=("does not know 1 of 1 genes", "NOSUCH"))
    assert not (tmp_path / "no.h5ad").exists()


def test_cells_without_genes_of_the_model() -> None:
    bundle, cells = geneformer(), marker_cells(4)
    cells.X = sparse.csr_matrix(cells.shape, dtype=np.float32)
    for call in (attention, gene_embeddings):
        with pytest.raises((DataError, UserError)):
            call(bundle, cells)


def test_memory_that_is_too_small_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is tried again in parts counts once."""
    import scmodelforge.inference_genes as module

    bundle, cells = geneformer(), marker_cells(16)
    expected = attention(bundle, cells)
    tries = []

    def fails_first(q, k, sequences, *more):
        for number, part in enumerate(true_weights(q, k, sequences, *more)):
            if len(tries) == 0 and number == 3:
                tries.append(number)
                raise torch.OutOfMemoryError("too small")
            yield part

    true_weights = module.attention_weights
    monkeypatch.setattr(module, "attention_weights", fails_first)
    found = attention(bundle, cells)
    assert tries == [3]
    np.testing.assert_allclose(found.X.toarray(), expected.X.toarray(), atol=1e-6)
    assert (found.layers["n_cells"] != expected.layers["n_cells"]).nnz == 0


def test_a_causal_model_has_both() -> None:
    bundle, cells = built(**CAUSAL), marker_cells(10)
    result = attention(bundle, cells)
    ids = tokens_of(bundle, cells).input_ids[0].numpy() - bundle.vocab.first_gene_token
    first, last = bundle.vocab.gene_ids[ids[ids >= 0][[0, -2]]]
    one = attention(bundle, cells[:1].copy())
    assert one[first, last].X.toarray() == 0, "nobody reads what comes after"
    assert one[last, first].X.toarray() > 0
    assert (result.X.diagonal() > 0).all()
    assert gene_embeddings(bundle, cells).n_obs == 40
