"""Benchmark results as those of cz-benchmarks, the package of the Chan Zuckerberg Initiative.

Its results are a list of `MetricResult` (czbenchmarks.metrics.types, version 0.15): `metric_type`, one of its names,
`value` and `params`, which tell results of the same type apart. Only figures that mean the same there are handed over;
how they were made (splits, classifier, clustering) differs from its own tasks and is in `params`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scmodelforge.models.card import read_results

log = logging.getLogger(__name__)

# Our figure → its metric type, and what has to be said about it.
NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "nmi_kmeans": ("normalized_mutual_info", {"clustering": "kmeans"}),
    "ari_kmeans": ("adjusted_rand_index", {"clustering": "kmeans"}),
    "nmi_leiden": ("normalized_mutual_info", {"clustering": "leiden"}),
    "ari_leiden": ("adjusted_rand_index", {"clustering": "leiden"}),
    "silhouette_label": ("silhouette_score", {}),
    "silhouette_batch": ("batch_silhouette", {}),
    "mse": ("mean_squared_error", {}),
    "pearson": ("PEARSON_CORRELATION", {}),
}
OF_CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "accuracy": ("accuracy", {}),
    "macro_f1": ("f1", {"average": "macro"}),
    "macro_precision": ("precision", {"average": "macro"}),
    "macro_recall": ("recall", {"average": "macro"}),
}
PROBE = "linear_probe"  # logistic regression, which it calls "lr"


def to_cz_benchmarks(results: Mapping[str, Any] | str | Path) -> list[dict[str, Any]]:
    """Results of `benchmark` in the form of cz-benchmarks, ready for JSON.

    Parameters
    ----------
    results
        What `benchmark --output` wrote: the file, or what is in it.

    Returns
    -------
    list of dict
        Fields of a `MetricResult`: `metric_type`, `value` and `params` (benchmark, dataset, method, split and what
        `NAMES` says). Means over several splits are of the types `mean_fold_…`. Figures that cz-benchmarks has no type
        for are left out, and that is said.

    Raises
    ------
    ModelError
        If the results cannot be read.
    """
    converted, unknown = [], set()
    for row in read_results(results)["results"]:
        metrics = row["metrics"]
        common = {
            "benchmark": row["benchmark"],
            "dataset": row["dataset"],
            "method": row["method"],
            **({"split": metrics["split"]} if "split" in metrics else {}),
            **({"classifier": "lr"} if row["benchmark"] == PROBE else {}),
        }
        for name, value in metrics.items():
            if not isinstance(value, float) or name.endswith("_std"):
                continue  # facts and spreads, which it has no place for
            if name in OF_CLASSES:
                kind, more = OF_CLASSES[name]
                kind = f"mean_fold_{kind}" if metrics.get("n_splits", 1) > 1 else kind
            elif name in NAMES:
                kind, more = NAMES[name]
            else:
                unknown.add(name)
                continue
            converted.append({"metric_type": kind, "value": value, "params": {**common, **more}})
    if unknown:
        log.info("cz-benchmarks has no type for these figures, left out: %s", ", ".join(sorted(unknown)))
    return converted
