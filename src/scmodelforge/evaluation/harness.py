"""Many benchmarks of one model on one data set, beside its baselines, on the same cells and splits."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse

from scmodelforge import registry
from scmodelforge.config import Config, EmbeddingQualitySpec, LinearProbeSpec
from scmodelforge.data.sources import open_matrix
from scmodelforge.errors import require_extra
from scmodelforge.evaluation.baselines import pca_embedding
from scmodelforge.evaluation.embedding_quality import quality_cells
from scmodelforge.evaluation.linear_probe import probe_cells
from scmodelforge.files import ensure_target, write_text
from scmodelforge.inference import as_bundle, embed_store, open_for
from scmodelforge.models.bundle import ModelBundle, build_model, with_model_of
from scmodelforge.models.embeddings import ExternalGenes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark of one embedding.

    Attributes
    ----------
    benchmark, dataset
        Names from the config.
    method
        "model", "untrained" or "pca".
    metrics
        Figures and facts by name.
    """

    benchmark: str
    dataset: str
    method: str
    metrics: dict[str, Any]


def benchmark(
    config: Config,
    model: ModelBundle | str | Path,
    data: AnnData | str | Path,
    output: str | Path | None = None,
) -> list[BenchmarkResult]:
    """Run the benchmarks of `config.eval` on a model and its baselines.

    Cells are embedded with the model's own vocabulary, tokenizer and preprocessing.

    Parameters
    ----------
    config
        `eval` is read; `tokenizer` and `model` only to compare with the model's.
    model
        A loaded model, a checkpoint or a model folder.
    data
        Labelled cells with raw counts.
    output
        JSON file for the results.

    Raises
    ------
    UserError
        If config and model contradict each other, or data or labels cannot be used.
    """
    for spec in config.eval.benchmarks:
        if isinstance(spec, EmbeddingQualitySpec):
            require_extra("scib_metrics", "eval", "The benchmark embedding_quality")
    if output is not None:
        ensure_target(output)
    bundle = as_bundle(model)
    with_model_of(config, bundle, str(model) if not isinstance(model, ModelBundle) else "memory")
    store = open_for(bundle, data, config.data)
    where = str(store.files[0])
    for spec in config.eval.benchmarks:  # labels are cheap to check, embedding all cells is not
        if isinstance(spec, EmbeddingQualitySpec):
            quality_cells(store.obs, spec.params, config.eval.seed, where)
        elif isinstance(spec, LinearProbeSpec):
            probe_cells(store.obs, spec.params, config.eval.seed, where)

    embeddings = {"model": embed_store(bundle, store, config.eval.batch_size)}
    if "untrained" in config.eval.baselines:
        fresh = ModelBundle(
            bundle.config, bundle.vocab, build_model(bundle.config, bundle.vocab, config.eval.seed)
        )
        given, genes = bundle.model.embedding.tokens, fresh.model.embedding.tokens
        if isinstance(given, ExternalGenes) and isinstance(genes, ExternalGenes):
            genes.load_vectors(given.vectors.weight)
        embeddings["untrained"] = embed_store(fresh, store, config.eval.batch_size)
    if "pca" in config.eval.baselines:
        embeddings["pca"] = pca_embedding(all_counts(data, config.data.layer), config.eval.seed)

    results = []
    for spec in config.eval.benchmarks:
        run = registry.BENCHMARKS.load(spec.name)
        for method, embedding in embeddings.items():
            log.info("%s of %s on %s", spec.name, method, spec.dataset)
            metrics = run(embedding, store.obs, spec.params, config.eval.seed, where)
            results.append(BenchmarkResult(spec.name, spec.dataset, method, metrics))
    if output is not None:
        write_results(results, output, {"model": str(model), "data": where, "n_cells": store.n_cells})
    return results


def all_counts(data: AnnData | str | Path, layer: str | None) -> sparse.csr_matrix:
    """All counts of a data set, over all genes it measured: float32 CSR (n_cells, n_genes), in memory."""
    matrix = open_matrix(data, layer)
    indptr, indices, values = matrix.read(np.arange(matrix.n_cells))
    return sparse.csr_matrix((values, indices, indptr), shape=(matrix.n_cells, matrix.n_genes))


def write_results(results: list[BenchmarkResult], output: str | Path, facts: dict[str, Any]) -> None:
    """Write results as JSON: facts, versions, and one record per benchmark and method."""
    versions = {name: importlib.metadata.version(name) for name in ("scmodelforge", "torch", "scikit-learn")}
    record = {**facts, "versions": versions, "results": [vars(result) for result in results]}
    write_text(output, json.dumps(record, indent=2) + "\n")
