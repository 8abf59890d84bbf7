"""`perturb` finds what a plain loop over cells and genes finds, and what was planted; mistakes get a sentence."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.stats import ranksums

import scmodelforge
from scmodelforge import inference_batches
from scmodelforge.errors import UserError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.bundle import ModelBundle, build_model
from scmodelforge.perturbation import run
from scmodelforge.report.volcano import plot_volcano, write_perturbations
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.training.run import RunResult
from tests.helpers import make_cells, make_vocab, marker_cells, tiny_config
from tests.perturbation.test_variants import V1, V2, deleted_slowly, overexpressed_slowly

MAX = 12  # tokens; some cells of `few_cells` have more genes


@pytest.fixture(autouse=True)
def _fewer_random_perturbations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RANDOM_POOL", 200)


def few_cells(n_cells: int = 12) -> anndata.AnnData:
    return marker_cells(n_cells, seed=3)[:, :28].copy()


@functools.cache
def vocab_of(layout: str) -> GeneVocab:
    return make_vocab(28, layout=layout)


def bundle_of(pooling: str, tokenizer: dict[str, Any], **model: Any) -> ModelBundle:
    """An untrained model whose weights are large enough that perturbations show."""
    config = tiny_config(
        Path("nowhere"), tokenizer={"max_genes": MAX} | tokenizer, model={"pooling": pooling} | model
    )
    vocab = vocab_of(config.tokenizer.vocab_layout)
    network = build_model(config, vocab, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return ModelBundle(config, vocab, network.eval(), None, None)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


class Plain:
    """One cell at a time, padded, without any of the code under test."""

    def __init__(self, bundle: ModelBundle, cells: anndata.AnnData) -> None:
        self.bundle, self.first = bundle, bundle.vocab.first_gene_token
        tokens = build_tokenizer(bundle.config, bundle.vocab)(make_cells(cells.X.toarray()))
        pairs = zip(tokens.input_ids.tolist(), tokens.lengths.tolist(), strict=True)
        self.cells = [ids[:length] for ids, length in pairs]

    def hidden(self, ids: list[int]) -> np.ndarray:
        padded = torch.tensor([[*ids, 0, 0]])
        tokens = TokenBatch(
            padded, torch.ones(padded.shape), torch.tensor([len(ids)]), torch.tensor([0]), has_padding=True
        )
        with torch.no_grad():
            return self.bundle.model(tokens)[0, : len(ids)].double().numpy()

    def embedding(self, ids: list[int]) -> np.ndarray:
        hidden = self.hidden(ids)
        if self.bundle.model.pooling == "cls":
            return hidden[0]
        return hidden[[token >= self.first for token in ids]].mean(axis=0)

    def unlike(self, perturbed: list[int], original: list[int], genes: list[int]) -> float:
        if self.bundle.model.pooling == "cls":
            return 1 - cosine(self.embedding(perturbed), self.embedding(original))
        after, before = (dict(zip(ids, self.hidden(ids), strict=True)) for ids in (perturbed, original))
        others = [token for token in perturbed if token >= self.first and token not in genes]
        return 1 - float(np.mean([cosine(after[token], before[token]) for token in others]))

    def pairs(self, genes: list[int], how: str) -> list[tuple[list[int], list[int]]]:
        """Perturbed cells with their originals."""
        tokenizer = self.bundle.config.tokenizer
        if how == "delete":
            return [(deleted_slowly(ids, genes), ids) for ids in self.cells if set(genes) <= set(ids)]
        return [
            overexpressed_slowly(ids, genes, MAX, tokenizer.prepend_cls, tokenizer.append_eos)
            for ids in self.cells
        ]


MODELS = {"v1": ("mean", V1), "v2": ("cls", V2), "v2, mean": ("mean", V2)}


@pytest.mark.parametrize("how", ["delete", "overexpress"])
@pytest.mark.parametrize("name", MODELS)
def test_without_states_it_is_what_a_plain_loop_finds(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(inference_batches.BUDGET, "cpu", 100)  # so that a set of variants is in many batches
    bundle, cells = bundle_of(*MODELS[name]), few_cells()
    plain, first = Plain(bundle, cells), bundle.vocab.first_gene_token
    assert max(map(len, plain.cells)) == MAX, "some cells must be full"
    single = scmodelforge.perturb(cells, bundle, ["G20", "G2", "G25"], how=how).set_index("symbol")
    for gene in (20, 2, 25):
        pairs = plain.pairs([first + gene], how)
        expected = [plain.unlike(*pair, [first + gene]) for pair in pairs]
        assert single.loc[f"G{gene}", "n_cells"] == len(pairs) > 1
        assert single.loc[f"G{gene}", "mean_shift"] == pytest.approx(np.mean(expected), abs=1e-6)
    pair = scmodelforge.perturb(cells, bundle, ["G20", "G25"], how=how, together=True)
    pairs = plain.pairs([first + 20, first + 25], how)
    expected = [plain.unlike(*each, [first + 20, first + 25]) for each in pairs]
    assert (pair["symbol"][0], pair["n_cells"][0]) == ("G20+G25", len(pairs))
    assert pair["mean_shift"][0] == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("how", ["delete", "overexpress"])
@pytest.mark.parametrize("name", MODELS)
def test_shifts_of_all_genes_are_what_a_plain_loop_finds(name: str, how: str) -> None:
    bundle, cells = bundle_of(*MODELS[name]), few_cells(30)
    plain, first = Plain(bundle, cells), bundle.vocab.first_gene_token
    of = cells.obs["cell_type"].to_numpy()
    states = {
        state: np.mean(
            [plain.embedding(ids) for ids, own in zip(plain.cells, of, strict=True) if own == state], axis=0
        )
        for state in ("B", "T", "NK")
    }
    shifts: dict[int, list[list[float]]] = {}
    for ids, own in zip(plain.cells, of, strict=True):
        if own != "B":
            continue
        genes = [token for token in ids if token >= first]
        for gene in genes if how == "delete" else genes[1:]:
            perturbed = deleted_slowly(ids, [gene])
            if how == "overexpress":
                perturbed.insert(bundle.config.tokenizer.prepend_cls, gene)
            before, after = plain.embedding(ids), plain.embedding(perturbed)
            moved = [cosine(after, states[s]) - cosine(before, states[s]) for s in ("T", "B", "NK")]
            shifts.setdefault(gene - first, []).append(moved)
    table = scmodelforge.perturb(
        cells, bundle, how=how, state_key="cell_type", start="B", goal="T", alt=["NK"]
    )
    expected = pd.DataFrame({f"G{gene}": np.mean(moved, axis=0) for gene, moved in shifts.items()}).T
    found = table.set_index("symbol").loc[expected.index]
    columns = ["mean_shift", "mean_shift_to_B", "mean_shift_to_NK"]
    np.testing.assert_allclose(found[columns], expected, atol=2e-6)
    pool = np.concatenate([np.array(moved)[:, 0] for moved in shifts.values()])
    strongest = found["p_value"].idxmin()
    own = np.array(shifts[int(strongest[1:])])[:, 0]
    assert found.loc[strongest, "p_value"] == pytest.approx(ranksums(own, pool).pvalue, rel=0.05)


@pytest.mark.parametrize("architecture", ["autoregressive_transformer", "masked_autoencoder"])
def test_values_beside_the_tokens(architecture: str) -> None:
    causal = architecture == "autoregressive_transformer"
    task = "dual_prediction" if causal else "expression_reconstruction"
    bundle = bundle_of(
        "mean",
        {"strategy": "continuous_projection", "max_genes": 40},
        architecture=architecture,
        pretraining_task=task,
    )
    cells = few_cells()
    gene = bundle.vocab.first_gene_token + 20
    tokens = build_tokenizer(bundle.config, bundle.vocab)(make_cells(cells.X.toarray()))

    def hidden(ids: list[int], values: list[float]) -> dict[int, np.ndarray]:
        one = TokenBatch(
            torch.tensor([ids]), torch.tensor([values]), torch.tensor([len(ids)]), torch.tensor([0]), False
        )
        with torch.no_grad():
            states = bundle.model(one, embed=True) if causal else bundle.model(one)
        return dict(zip(ids, states[0].double().numpy(), strict=True))

    overexpressed, deleted = [], []
    for row, length in enumerate(tokens.lengths.tolist()):
        ids, values = tokens.input_ids[row, :length].tolist(), tokens.values[row, :length].tolist()
        before = hidden(ids, values)
        others = [token for token in ids if token >= bundle.vocab.first_gene_token and token != gene]
        if gene in ids:
            place = ids.index(gene)
            after = hidden(ids[:place] + ids[place + 1 :], values[:place] + values[place + 1 :])
            deleted.append(1 - np.mean([cosine(after[token], before[token]) for token in others]))
            values[place] = max(values)
        else:
            ids.insert(1, gene)
            values.insert(1, max(values))
        after = hidden(ids, values)
        overexpressed.append(1 - np.mean([cosine(after[token], before[token]) for token in others]))
    assert 0 < len(deleted) < len(overexpressed) == 12
    for how, expected in {"overexpress": overexpressed, "delete": deleted}.items():
        table = scmodelforge.perturb(cells, bundle, ["G20"], how=how)
        assert table["n_cells"][0] == len(expected)
        assert table["mean_shift"][0] == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_planted_genes_are_found(pretrained: RunResult) -> None:
    table = scmodelforge.perturb(marker_cells(), pretrained.model, state_key="cell_type", start="B", goal="T")
    markers = {
        f"ENSG{gene:011d}" for gene in range(6)
    }  # of B cells: without them, these are more like T cells
    assert markers <= set(table["gene_id"][:7])
    assert (table["fdr"][:6] < 1e-4).all()
    assert (table["effect"][:6] > 0.3).all()
    assert table["n_cells"].max() == (marker_cells().obs["cell_type"] == "B").sum()


def test_against_cells_of_a_null_state() -> None:
    bundle, cells = bundle_of("mean", V2), few_cells(60)
    how: dict[str, Any] = {"state_key": "cell_type", "goal": "T"}
    table = scmodelforge.perturb(cells, bundle, start="B", null="NK", **how).set_index("symbol")
    of_start = scmodelforge.perturb(cells, bundle, start="B", **how).set_index("symbol")
    of_null = scmodelforge.perturb(cells, bundle, start="NK", **how).set_index("symbol")
    common = of_start.index.intersection(of_null.index)
    assert set(table.index) == set(common)
    np.testing.assert_allclose(table["mean_shift"], of_start.loc[table.index, "mean_shift"], atol=1e-6)
    np.testing.assert_allclose(table["mean_shift_null"], of_null.loc[table.index, "mean_shift"], atol=1e-6)
    np.testing.assert_array_equal(table["n_cells_null"], of_null.loc[table.index, "n_cells"])
    assert np.sign(table["effect"]).corr(np.sign(table["mean_shift"] - table["mean_shift_null"])) > 0.5


def test_the_same_cells_and_random_genes_each_time() -> None:
    bundle, cells = bundle_of("mean", V2), few_cells(60)
    tables = [scmodelforge.perturb(cells, bundle, ["G20"], max_cells=20, seed=seed) for seed in (1, 1, 2)]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert tables[0]["mean_shift"][0] != tables[2]["mean_shift"][0]


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    bundle, cells = bundle_of("mean", V2), few_cells()
    counts = cells.X.tolil()
    counts[3], counts[:, 20] = 0, 0
    cells.X = counts.tocsr()
    with caplog.at_level(logging.INFO, "scmodelforge"):
        table = scmodelforge.perturb(cells, bundle, ["G20", "G21"], max_cells=11)
    assert table["symbol"].tolist() == ["G21"]
    said = "\n".join(caplog.messages)
    assert "G20: in none of these cells, so there is nothing to delete. They are left out." in said
    assert "11 of 12 cells are perturbed (max_cells)." in said
    assert "random perturbations of these cells: mean shift" in said


def test_a_gene_beyond_the_tokens_is_not_said_to_be_missing(caplog: pytest.LogCaptureFixture) -> None:
    bundle, cells = bundle_of("mean", V1), few_cells()
    counts = cells.X.toarray()
    counts[:, :15], counts[:, 20], counts[:, 21] = 50, 0, 0
    counts[:5, 20] = 1  # expressed, but the other genes of these cells come first
    counts[:, 22] = 60
    counts[:4, 22] = 1  # so in four cells
    cells.X = sparse.csr_matrix(counts)
    with caplog.at_level(logging.INFO, "scmodelforge"):
        table = scmodelforge.perturb(cells, bundle, ["G20", "G21", "G22"])
    assert table["symbol"].tolist() == ["G22"]
    assert table["n_cells"].tolist() == [8]
    said = "\n".join(caplog.messages)
    of = "the 12 genes that the model reads of a cell (tokenizer.max_genes)"
    assert f"G20: expressed in 5 of these cells, but in none among {of}" in said
    assert "G21: in none of these cells" in said
    assert f"G22: expressed in 12 of these cells, in 8 among {of}" in said
    with pytest.raises(
        UserError, match=r"G20: expressed in 5 of these cells, but in none among the 12 genes"
    ):
        scmodelforge.perturb(cells, bundle, ["G20"])


@pytest.mark.parametrize("how", ["delete", "overexpress"])
@pytest.mark.parametrize("null", [None, "NK"])
@pytest.mark.parametrize("genes", ["all", ["G20", "G21"]])
def test_what_there_is_to_compute_is_said_before(
    genes: str | list[str],
    null: str | None,
    how: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "SECONDS", -1.0)
    options: dict[str, Any] = {"state_key": "cell_type", "start": "B", "null": null} if null else {}
    with caplog.at_level(logging.INFO, "scmodelforge"):
        scmodelforge.perturb(few_cells(40), bundle_of("mean", V2), genes, how=how, **options)
    announced = next(text for text in caplog.messages if "perturbed cells" in text)
    numbers = re.findall(r"([\d,]+) (?:perturbed cells|with random|of [\d,]+ cells of 'NK')", announced)
    total = sum(int(number.replace(",", "")) for number in numbers)
    assert len(numbers) == (1 if genes == "all" and null is None else 2), announced
    last = [text for text in caplog.messages if text.endswith(" left")][-1]
    assert last.startswith(f"{total:,} of {total:,} perturbed cells (")
    assert last.endswith("about 0:00:00 left")


@pytest.mark.parametrize("how", ["delete", "overexpress"])
def test_a_cell_with_no_other_gene_is_not_perturbed(how: str) -> None:
    bundle, cells = bundle_of("mean", V1), few_cells()
    counts = cells.X.tolil()
    counts[0] = 0
    counts[0, 20] = 3
    counts[1, 20] = 3
    cells.X = counts.tocsr()
    table = scmodelforge.perturb(cells, bundle, ["G20"], how=how)
    has = cells.X.toarray()[:, 20] > 0
    assert table["n_cells"][0] == (has.sum() if how == "delete" else len(has)) - 1
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gene": (
        {"genes": ["G20", "G200", "ENSG00000000077"]},
        ("does not know 2 of the genes", "G200: unknown name; did you mean G20", "ENSG00000000077: "),
    ),
    "no gene": ({"genes": ["G1", " "]}, ("empty name",)),
    "twice": ({"genes": ["G1", "ENSG00000000001"]}, ("given twice: ENSG00000000001",)),
    "absent": (
        {"genes": ["G27"], "state_key": "cell_type", "start": "B"},
        ("G27: in none of these cells", "how=overexpress"),
    ),
    "all together": ({"together": True}, ("a set is a list of genes",)),
    "too many": (
        {"genes": [f"G{gene}" for gene in range(12)], "together": True},
        ("The set has 12 genes", "at most 12 of a cell"),
    ),
    "how": ({"how": "inhibit"}, ("how is 'inhibit'; it must be delete or overexpress",)),
    "column": (
        {"state_key": "celltype", "start": "B"},
        ("no obs column 'celltype'", "Did you mean 'cell_type'?", "donor"),
    ),
    "state": (
        {"state_key": "cell_type", "start": "B", "goal": "NKT"},
        ("No cell of", "'NKT' in obs['cell_type']", "States: "),
    ),
    "no column": ({"start": "B"}, ("--state-key",)),
    "no start": (
        {"state_key": "cell_type", "goal": "B"},
        ("which cells of obs['cell_type'] to perturb: --start",),
    ),
    "alt alone": ({"state_key": "cell_type", "start": "B", "alt": ["T"]}, ("no goal",)),
    "same state": ({"state_key": "cell_type", "start": "B", "goal": "B"}, ("A state is given twice",)),
    "null is start": (
        {"state_key": "cell_type", "start": "B", "null": "B"},
        ("both the start and the null",),
    ),
    "cells": ({"max_cells": 0}, ("max_cells is 0",)),
    "pooling": ({"pooling": "max"}, ("must be mean, cls or window",)),
    "no cls": ({"pooling": "cls"}, ("has no <cls> token", "Use pooling mean")),
    "precision": ({"precision": "16"}, ("it must be 32, bf16 or bf16-true",)),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_get_a_sentence(name: str) -> None:
    how, words = BAD[name]
    cells = few_cells()
    counts = cells.X.tolil()
    counts[:, 27] = 0
    cells.X = counts.tocsr()
    with pytest.raises(UserError) as caught:
        scmodelforge.perturb(cells, bundle_of("mean", V1), **how)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)


def test_a_gene_without_a_vector_is_refused() -> None:
    bundle = bundle_of("mean", V1)
    medians = np.ones(28)
    medians[4] = np.nan
    never_seen = ModelBundle(bundle.config, bundle.vocab.with_medians(medians), bundle.model, None, None)
    with pytest.raises(UserError, match="G4: no training cell had it"):
        scmodelforge.perturb(few_cells(), never_seen, ["G4"], how="overexpress")


def test_the_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "gene_id": [f"ENSG{i}" for i in range(50)],
            "symbol": [f"GENE{i}" for i in range(50)],
            "n_cells": 9,
            "mean_shift": rng.normal(size=50),
            "effect": np.linspace(-1, 1, 50),
            "p_value": 0.0,
            "fdr": np.r_[0.0, np.geomspace(1e-9, 1, 49)],
        }
    )
    said = write_perturbations(table, tmp_path, "delete", "B", "T")
    assert "39 of 50" in said or f"{(table.fdr < 0.05).sum()} of 50" in said
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "perturbations.csv"), table)
    plot_volcano(table, tmp_path / "volcano.svg", "delete in B cells", "mean shift towards T")
    picture = (tmp_path / "volcano.svg").read_text()
    assert all(
        f"<!-- {text} -->" in picture for text in ("delete in B cells", "mean shift towards T", "GENE0")
    )
    assert "<!-- GENE49 -->" not in picture
