"""Are the embeddings any good? PCA, the untrained, the pretrained and the fine-tuned model on real cells.

For each seed, a part of each labelled data set is held out (by donor where there are donors). One small model
is pretrained on the unlabelled union of the human files without any held-out cell, and fine-tuned on the
labels of each data set's remaining cells. Every method is then judged on the held-out cells: macro F1 of a linear
probe fitted on the remaining cells, and the scIB total of the held-out cells themselves. The fine-tuned model's own
labels are scored beside the probe: it has seen the remaining cells' labels, so a probe fitted on the same cells
trusts their embeddings too much.

    python benchmarks/quality.py --data ../shared/data --json quality.json

pbmc_ifnb_kang is left out of the pretraining: it holds cells of the same donors as pbmc_kang_12k.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import anndata
import harness
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

MIN_CELLS_PER_CLASS = 10  # as in the figures to beat


@dataclass(frozen=True)
class Dataset:
    """A labelled data set: what is held out together, what counts as a batch, the PCA figure to beat."""

    name: str
    group_key: str | None
    batch_key: str | None
    bar: float
    unlabelled: tuple[str, ...] = ()


DATASETS = (
    Dataset("pbmc3k", None, None, 0.915, unlabelled=("unknown",)),
    Dataset("pbmc_kang_12k", "donor", "donor", 0.830),
    Dataset("pbmc_sorted_zheng", None, None, 0.883),
    Dataset("gut_crohns_kong", "donor", None, 0.885),
)
OTHER_CELLS = (
    "pbmc_frozen_a",
    "cell_lines_mixology",
    "pancreas_baron_human",
    "census_placenta",
    "tenx_v3_pbmc_sample",
)
METHODS = ("pca", "untrained", "pretrained", "fine-tuned")

CONFIG = {
    "data": {
        "preprocessing": {"hvg": {"n_top_genes": 6000, "flavor": "cell_ranger"}},
        "split": {"val_split": 0.02},
    },
    "tokenizer": {"max_genes": 160, "masking": {"mask_ratio": 0.2}},
    "model": {"hidden_dim": 64, "num_layers": 2, "num_heads": 4, "dropout": 0.1},
    "training": {"batch_size": 64, "optimizer": {"lr": 3e-3, "weight_decay": 0.01}},
}
FINETUNING = {"batch_size": 64, "max_epochs": 40, "optimizer": {"lr": 1e-3}}


def labelled_cells(dataset: Dataset, folder: Path) -> anndata.AnnData:
    """The cells of classes with enough cells."""
    adata = anndata.read_h5ad(folder / f"{dataset.name}.h5ad")
    labels = adata.obs["cell_type"].astype("string")
    labels = labels.mask(labels.isin(dataset.unlabelled))
    enough = labels.map(labels.value_counts()) >= MIN_CELLS_PER_CLASS
    return adata[enough.fillna(False).to_numpy(dtype=bool)].copy()


def hold_out(adata: anndata.AnnData, dataset: Dataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and held-out rows, a fifth of the cells or of the donors."""
    from scmodelforge.config_eval import LinearProbeParams
    from scmodelforge.evaluation.splits import probe_splits, usable_groups

    groups = usable_groups(adata.obs, dataset.group_key, dataset.name) if dataset.group_key else None
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    return probe_splits(labels, LinearProbeParams(n_splits=1), groups, seed)[0]


def macro_f1(embedding: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Macro F1 of a linear probe on the held-out cells."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(embedding[train], labels[train])
    truth = labels[test]
    predicted = probe.predict(embedding[test])
    return float(f1_score(truth, predicted, average="macro", labels=np.unique(truth), zero_division=0))


def scib_total(embedding: np.ndarray, adata: anndata.AnnData, dataset: Dataset, test: np.ndarray) -> float:
    """scIB total of the held-out cells (biology alone where there are no batches)."""
    from scmodelforge.config_eval import EmbeddingQualityParams
    from scmodelforge.evaluation.embedding_quality import embedding_quality

    params = EmbeddingQualityParams(batch_key=dataset.batch_key, max_cells=1000)
    obs = adata.obs.iloc[test]
    common = obs["cell_type"].map(obs["cell_type"].value_counts()).astype(int).to_numpy() >= 2
    return float(embedding_quality(embedding[test][common], obs[common], params, seed=0)["total"])


def one_seed(seed: int, data: str, epochs: int, finetune_steps: int, scib: bool) -> dict[str, float]:
    """All figures of one seed, as "DATASET/METHOD/METRIC"."""
    from scmodelforge.config_io import parse_config
    from scmodelforge.evaluation.baselines import pca_embedding
    from scmodelforge.finetuning.run import finetune
    from scmodelforge.inference import embed_store, open_for, predict_store
    from scmodelforge.models.bundle import ModelBundle, build_model
    from scmodelforge.training.run import train

    logging.getLogger("scmodelforge").setLevel(logging.WARNING)
    folder = Path(data)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cells, splits, paths = {}, {}, [str(folder / f"{name}.h5ad") for name in OTHER_CELLS]
        for dataset in DATASETS:
            cells[dataset.name] = labelled_cells(dataset, folder)
            splits[dataset.name] = hold_out(cells[dataset.name], dataset, seed)
            path = Path(scratch) / f"{dataset.name}_train.h5ad"
            cells[dataset.name][splits[dataset.name][0]].write_h5ad(path)
            paths.append(str(path))

        started = time.perf_counter()
        config = {**CONFIG, "data": {**CONFIG["data"], "paths": paths}}
        config["training"] = {
            **CONFIG["training"],
            "seed": seed,
            "max_epochs": epochs,
            "run_dir": f"{scratch}/pretrained",
        }
        pretrained = train(parse_config(config)).model
        figures["pretraining/seconds"] = time.perf_counter() - started
        untrained = ModelBundle(
            pretrained.config, pretrained.vocab, build_model(pretrained.config, pretrained.vocab, seed)
        )
        for dataset in DATASETS:
            adata, (learn, test) = cells[dataset.name], splits[dataset.name]
            store = open_for(pretrained, adata)
            tuned = finetune(
                parse_config(
                    {
                        "data": {"split": {"val_split": 0.1}},
                        "finetune": {"head_lr": 5e-3},
                        "training": {
                            **FINETUNING,
                            "max_steps": finetune_steps,
                            "seed": seed,
                            "run_dir": f"{scratch}/{dataset.name}",
                        },
                    }
                ),
                f"{scratch}/pretrained/model",
                data=adata[learn].copy(),
            ).model
            embeddings = {
                "pca": pca_embedding(adata.X, seed),
                "untrained": embed_store(untrained, store, 128),
                "pretrained": embed_store(pretrained, store, 128),
                "fine-tuned": embed_store(tuned, store, 128),
            }
            labels = adata.obs["cell_type"].astype(str).to_numpy()
            for method, embedding in embeddings.items():
                key = f"{dataset.name}/{method}"
                figures[f"{key}/macro F1"] = macro_f1(embedding, labels, learn, test)
                if scib:
                    figures[f"{key}/scIB total"] = scib_total(embedding, adata, dataset, test)
                shown = {k.split("/")[-1]: round(v, 3) for k, v in figures.items() if k.startswith(f"{key}/")}
                print(seed, key, shown, flush=True)
            predicted = predict_store(tuned, store, 128).iloc[:, 0].astype(str).to_numpy()
            truth = labels[test]
            figures[f"{dataset.name}/fine-tuned, own labels/macro F1"] = float(
                f1_score(truth, predicted[test], average="macro", labels=np.unique(truth), zero_division=0)
            )
    return figures


def main() -> None:
    """Run all seeds and print mean and spread."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="../shared/data", help="folder with the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="pretraining epochs")
    parser.add_argument("--finetune-steps", type=int, default=250)
    parser.add_argument("--no-scib", action="store_true", help="macro F1 only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = [
        harness.fresh(
            one_seed,
            seed=seed,
            data=options.data,
            epochs=options.epochs,
            finetune_steps=options.finetune_steps,
            scib=not options.no_scib,
        )
        for seed in options.seeds
    ]
    rows = []
    for key in runs[0]:
        values = np.array([run[key] for run in runs])
        unit = "s" if key.endswith("seconds") else "score"
        peer = (
            float(np.mean([run[f"{key.split('/')[0]}/pca/{key.split('/')[-1]}"] for run in runs]))
            if unit == "score"
            else None
        )
        rows.append(
            harness.Row(
                f"{key} (± {values.std(ddof=1) if len(values) > 1 else 0:.3f})",
                float(values.mean()),
                unit,
                peer,
            )
        )
    harness.report(
        "quality of embeddings; peer: PCA", rows, harness.versions("scanpy", "scib-metrics"), options.json
    )


if __name__ == "__main__":
    main()
