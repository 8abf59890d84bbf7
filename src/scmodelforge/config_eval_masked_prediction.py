"""Config of the benchmark `masked_prediction`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scmodelforge.config_section import Section


class MaskedPredictionParams(Section):
    """The model's own pretraining task, on these cells."""

    reference_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of the cells that the baseline of means is taken from; the others are scored.",
    )
    max_cells: int = Field(
        1000, ge=20, description="Of more cells so many are drawn at random, on each side."
    )


class MaskedPredictionSpec(Section):
    """The pretraining metrics of a benchmark file."""

    name: Literal["masked_prediction"]
    dataset: str = Field("test", description="Name of the data set in the results.")
    params: MaskedPredictionParams = Field(default_factory=MaskedPredictionParams)
