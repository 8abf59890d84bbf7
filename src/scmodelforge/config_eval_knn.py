"""The keys of the benchmark `knn_annotation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scmodelforge.config_eval import LinearProbeParams
from scmodelforge.config_section import Section


class KnnAnnotationParams(LinearProbeParams):
    """Zero-shot label transfer from the nearest reference cells; the splits are those of the linear probe."""

    n_neighbors: int = Field(15, ge=1, description="Reference cells that vote on the label of a query cell.")
    held_out_classes: list[str] | None = Field(
        None,
        description="Classes that are taken from the reference, one at a time, to see whether their cells are found to "
        "be unknown; null: each class in turn; []: none.",
    )


class KnnAnnotationSpec(Section):
    """The label transfer of a benchmark file."""

    name: Literal["knn_annotation"]
    dataset: str = Field("test", description="Name of the data set in the results.")
    params: KnnAnnotationParams = Field(default_factory=KnnAnnotationParams)
