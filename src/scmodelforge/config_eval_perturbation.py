"""Config of the benchmark `perturbation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scmodelforge.config_section import Section


class PerturbationParams(Section):
    """Predict the effect of perturbations that the fit has not seen."""

    perturbation_key: str = Field(
        "perturbation",
        description="obs column that names the perturbed gene of each cell (A+B: both), by symbol or Ensembl id.",
    )
    control: str = Field("control", description="What the column says of unperturbed cells.")
    n_folds: int = Field(
        5, ge=2, description="Perturbations are divided into so many parts; each part is held out once."
    )
    n_top_genes: int = Field(
        20, ge=2, description="Genes that change most, for the figures that look at them only."
    )
    min_cells: int = Field(20, ge=2, description="Perturbations with fewer cells are left out.")


class PerturbationSpec(Section):
    """The perturbation prediction of a benchmark file."""

    name: Literal["perturbation"]
    dataset: str = Field("test", description="Name of the data set in the results.")
    params: PerturbationParams = Field(default_factory=PerturbationParams)
