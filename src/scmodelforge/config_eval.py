"""The keys of `eval`: which benchmarks run, on which columns, beside which baselines.

One `...Params` and one `...Spec` for each benchmark; `BenchmarkSpec` is the union that a file's list may hold.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from scmodelforge import registry
from scmodelforge.config_eval_gene_embedding import GeneEmbeddingSpec
from scmodelforge.config_eval_masked_prediction import MaskedPredictionSpec
from scmodelforge.config_eval_perturbation import PerturbationSpec
from scmodelforge.config_plugins import plugin_params
from scmodelforge.config_section import Section


class LinearProbeParams(Section):
    """Logistic regression on frozen embeddings."""

    cell_type_key: str = Field("cell_type", description="obs column with the labels.")
    test_size: float = Field(0.2, gt=0, lt=1, description="Share of cells (or groups) held out for testing.")
    group_key: str | None = Field(
        "auto",
        description="obs column whose groups stay whole, so that test groups are new to the probe; auto: the first "
        "known column of donors, batches or data sets (donor_id, patient, batch, dataset, ...); null: split by cell.",
    )
    n_splits: int = Field(5, ge=1, description="Number of random splits; the spread over them is reported.")
    min_cells_per_class: int = Field(2, ge=2, description="Classes with fewer cells are an error.")
    drop_small_classes: bool = Field(False, description="Leave out cells of too small classes instead.")
    drop_unlabelled: bool = Field(False, description="Leave out cells without a label instead of refusing.")


class LinearProbeSpec(Section):
    """The linear probe of a benchmark file."""

    name: Literal["linear_probe"]
    dataset: str = Field("test", description="Name of the data set in the results.")
    params: LinearProbeParams = Field(default_factory=LinearProbeParams)


class EmbeddingQualityParams(Section):
    """scIB metrics of the embedding (Luecken et al. 2022), by scib-metrics."""

    cell_type_key: str = Field("cell_type", description="obs column with the labels.")
    batch_key: str | None = Field(
        None, description="obs column with the batches; null: biology metrics only."
    )
    max_cells: int = Field(
        20_000, ge=10, description="Larger data are subsampled at random to so many cells."
    )
    drop_unlabelled: bool = Field(False, description="Leave out cells without a label instead of refusing.")


class EmbeddingQualitySpec(Section):
    """The embedding quality of a benchmark file."""

    name: Literal["embedding_quality"]
    dataset: str = Field("test", description="Name of the data set in the results.")
    params: EmbeddingQualityParams = Field(default_factory=EmbeddingQualityParams)


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


BuiltInSpec = Annotated[
    LinearProbeSpec
    | KnnAnnotationSpec
    | EmbeddingQualitySpec
    | MaskedPredictionSpec
    | PerturbationSpec
    | GeneEmbeddingSpec,
    Field(discriminator="name"),
]


class PluginSpec(Section):
    """A benchmark from a plugin in a benchmark file."""

    name: Annotated[str, AfterValidator(registry.BENCHMARKS.check)] = Field(description="Its name.")
    dataset: str = Field("test", description="Name of the data set in the results.")
    params: SerializeAsAny[Section] | None = Field(None, description="Keys that it has of its own.")

    @field_validator("params", mode="plain")
    @classmethod
    def _params(cls, value: Any, info: ValidationInfo) -> Section | None:
        return plugin_params(registry.BENCHMARKS, info.data.get("name"), value)


def _brought_by(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return "(plugin)" if name in list(registry.plugins_in(registry.BENCHMARKS.group)) else "(built-in)"


BenchmarkSpec = Annotated[
    Annotated[BuiltInSpec, Tag("(built-in)")] | Annotated[PluginSpec, Tag("(plugin)")],
    Discriminator(_brought_by),
]


def _only_linear_probe() -> list[BenchmarkSpec]:
    return [LinearProbeSpec(name="linear_probe")]


class EvalConfig(Section):
    """Which benchmarks run, and how cells are embedded for them."""

    batch_size: int = Field(256, ge=1, description="Cells per batch while embedding.")
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of splits, subsampling and the untrained baseline."
    )
    baselines: list[Literal["pca", "log_normalized", "untrained", "majority", "harmony", "scvi"]] = Field(
        ["pca", "log_normalized", "untrained", "majority"],
        description="Beside the model: PCA of log-normalized counts of variable genes; for labels, log_normalized "
        "(logistic regression on all genes) and majority (the most frequent class); the model before training; with "
        "extras, harmony (PCA corrected for batches) and scvi (trained on the cells).",
    )
    benchmarks: list[BenchmarkSpec] = Field(default_factory=_only_linear_probe, description="What to run.")
    every_n_epochs: int | None = Field(
        None,
        ge=1,
        description="During train: score the embeddings of the validation cells every so many epochs; null: do not.",
    )
    every_n_steps: int | None = Field(
        None, ge=1, description="The same every so many optimizer steps; null: do not."
    )

    @model_validator(mode="after")
    def _one_rhythm(self) -> EvalConfig:
        if self.every_n_epochs is not None and self.every_n_steps is not None:
            raise ValueError("every_n_epochs and every_n_steps exclude each other: set one of them to null")
        return self
