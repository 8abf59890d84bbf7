"""Every key that a YAML file may hold: type, default, unit, bounds and help, in one place.

The tree is pydantic, so an unknown key or an impossible value is an error before anything runs.
Reading files, line numbers and overrides live in `config_io`; nothing here touches the disk.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from scmodelforge import registry
from scmodelforge.config_census import CensusConfig
from scmodelforge.config_eval import EmbeddingQualityParams as EmbeddingQualityParams
from scmodelforge.config_eval import EmbeddingQualitySpec as EmbeddingQualitySpec
from scmodelforge.config_eval import EvalConfig
from scmodelforge.config_eval import LinearProbeParams as LinearProbeParams
from scmodelforge.config_eval import LinearProbeSpec as LinearProbeSpec
from scmodelforge.config_misfit import misfit
from scmodelforge.config_model import ModelConfig
from scmodelforge.config_plugins import plugin_misfit, plugin_params
from scmodelforge.config_presets import PRESETS
from scmodelforge.config_section import Section
from scmodelforge.config_training import TrainingConfig
from scmodelforge.strategies import require_allowed

# --- data -----------------------------------------------------------------------------------------


class HighlyVariableGenes(Section):
    """Keep only the most variable genes of the training cells, those that scanpy selects."""

    n_top_genes: int = Field(ge=1, description="How many genes to keep in the vocabulary.")
    flavor: Literal["seurat", "cell_ranger"] = Field(
        "seurat", description="Method of scanpy.pp.highly_variable_genes, on log-normalized values."
    )


class Preprocessing(Section):
    """What happens to the counts of a cell before a tokenizer sees them."""

    normalize: Literal["library_size", "none"] = Field(
        "library_size", description="Divide by the cell's library size over all genes measured, or not."
    )
    target_sum: float = Field(10_000, gt=0, description="Counts per cell after normalization.")
    log1p: bool = Field(
        True, description="Take log(1 + x) of the values carried beside the tokens (ranks are taken before)."
    )
    hvg: HighlyVariableGenes | None = Field(
        None, description="Selection of highly variable genes; null: none."
    )


class Split(Section):
    """Which cells validate and never train."""

    val_split: float = Field(
        0.1, ge=0, lt=1, description="Share of cells (or groups) held out for validation."
    )
    group_key: str | None = Field(
        None, description="obs column (donor, batch) whose groups stay whole; null: split by cell."
    )


class Sampling(Section):
    """Training cells drawn by weight instead of each once an epoch; the order stays a function of seed and epoch."""

    label_key: str | None = Field(
        None,
        description="obs column whose classes are balanced (within each data set of mixture); null: none.",
    )
    label_power: float = Field(
        1.0,
        ge=0,
        le=1,
        description="A class comes in proportion to frequency ** (1 - label_power): 0 as it is, 1 all classes equally "
        "often.",
    )
    curriculum_epochs: int = Field(
        0, ge=0, description="Epochs over which label_power grows from 0; 0: it holds from the start."
    )
    mixture: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        min_length=1,
        description="Weights of data sets: share of the cells drawn, in proportion. A key is a file of data.paths, its "
        "name, or a pattern; a file belongs to the first key that fits it, and '*' is all the others. null: as many "
        "as there are.",
    )
    caps: dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        None, description="Most cells an epoch of a data set, by its key in mixture; null: no cap."
    )
    max_repeats: float | None = Field(
        None,
        gt=0,
        description="How often the cells of a class or data set may come in an epoch, on average; what that cuts is "
        "given to the others. null: no cap.",
    )
    cells_per_epoch: int | None = Field(
        None, ge=1, description="Cells drawn in an epoch; null: as many as train."
    )

    @model_validator(mode="after")
    def _together(self) -> Sampling:
        if self.label_key is None and self.mixture is None and self.cells_per_epoch is None:
            raise ValueError(
                "names no label_key, mixture or cells_per_epoch, so that nothing is sampled: name one, or set "
                "data.sampling: null"
            )
        if nameless := sorted(set(self.caps or {}) - set(self.mixture or {})):
            raise ValueError(
                f"caps has {', '.join(nameless)}, which mixture has not: a cap needs a data set with a weight there"
            )
        return self


Species = Literal["human", "mouse"]


def _species(value: Any) -> Any:
    """Say in one sentence what is wrong, where the types below would say it once for each of them."""
    for one in value.values() if isinstance(value, dict) else [value]:
        if one not in ("human", "mouse") and not (one is None and value is None):
            raise ValueError(f"must be human, mouse, or a mapping of files to these, not {one!r}")
    return value


class DataConfig(Section):
    """Where the cells come from, and how their genes meet the vocabulary."""

    source: Literal["local", "census"] = Field(
        "local", description="local: the files of paths; census: the cells of a CELLxGENE Census."
    )
    paths: list[str] = Field(
        default_factory=list,
        description="One or many .h5ad files or .zarr stores, patterns or URLs of such, or folders of shards; gene "
        "sets may differ.",
    )
    cache_dir: str | None = Field(
        None,
        description="Folder for what is made once and used again: shards of files that train and finetune cannot map "
        "into memory (compressed, dense, CSC, chunked), and remote files. null: no such shards, and remote files in "
        "the folder that SCMODELFORGE_CACHE names, else ~/.cache/scmodelforge.",
    )
    cache_size_gb: float = Field(
        100.0,
        gt=0,
        description="Remote files kept, in GB: beyond it those used longest ago are removed, but none of this run.",
    )
    census: CensusConfig | None = Field(None, description="Which cells of the Census; with source: census.")
    layer: str | None = Field(
        None, description="Where the raw counts are: null for X, 'raw' for .raw.X, else the name of a layer."
    )
    gene_column: str | None = Field(
        None,
        description="var column with gene ids or symbols ('index' for var_names); null: found by itself.",
    )
    gene_vocab: str = Field(
        "human_protein_coding",
        description="human_protein_coding, mouse_protein_coding, from_data, or the path of a vocabulary.",
    )
    species: Annotated[Species | dict[str, Species] | None, BeforeValidator(_species)] = Field(
        None,
        description="Whose genes the files have: human or mouse, or a mapping of files (path, name or pattern) to "
        "these. Where it is not the vocabulary's species, one-to-one orthologs stand for the genes. null, and files "
        "that are not named: the vocabulary's.",
    )
    min_gene_overlap: float = Field(
        0.2, ge=0, le=1, description="Smallest share of a file's counts that must fall on vocabulary genes."
    )
    extend_vocab: str | None = Field(
        None,
        description="Training that starts from a model: add the genes of the data that it lacks. mean: they start as "
        "the mean of the model's genes and a little noise; or a file with vectors of genes, as in "
        "model.gene_embeddings; null: add none.",
    )
    preprocessing: Preprocessing = Field(default_factory=Preprocessing)
    split: Split = Field(default_factory=Split)
    sampling: Sampling | None = Field(
        None, description="Training cells drawn by label or data set; null: every cell once an epoch."
    )
    shuffle_buffer: int | None = Field(
        None,
        ge=1,
        description="Cells that are mixed at a time, for sources that read single cells slowly: blocks of neighbouring "
        "cells are shuffled, then the cells within the buffer. null: all cells at once, if the source can.",
    )


# --- tokenizer ------------------------------------------------------------------------------------


class Masking(Section):
    """BERT masking (Devlin et al. 2019): what is hidden, and what stands in its place."""

    mask_ratio: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="Share of a cell's gene tokens that are asked; 0.15 in Geneformer's presets.",
    )
    mask_token_share: float = Field(0.8, ge=0, le=1, description="Share of the asked replaced by <mask>.")
    random_share: float = Field(0.1, ge=0, le=1, description="Share of the asked replaced by a random gene.")
    reference: bool = Field(
        False,
        description="Mask as the published Geneformer collator does: CLS and EOS may be hidden, and random "
        "tokens may be special ones.",
    )

    @model_validator(mode="after")
    def _shares(self) -> Masking:
        if self.mask_token_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"mask_token_share ({self.mask_token_share:g}) and random_share ({self.random_share:g}) "
                "add up to more than 1"
            )
        return self


class TokenizerConfig(Section):
    """How a cell becomes tokens."""

    strategy: Annotated[str, AfterValidator(registry.TOKENIZERS.check)] = Field(
        "rank_value",
        description="rank_value: genes in order of median-scaled expression (Geneformer); binned_expression: "
        "genes with the bin of their value within the cell (scGPT); continuous_projection: genes with their "
        "counts or log-normalized values (TranscriptFormer).",
    )
    params: SerializeAsAny[Section] | None = Field(
        None, description="Keys that a strategy from a plugin has of its own."
    )
    max_genes: int = Field(2048, ge=4, description="Longest input in tokens, CLS and EOS included.")
    prepend_cls: bool = Field(True, description="Begin each cell with <cls>.")
    append_eos: bool = Field(False, description="End each cell with <eos>.")
    vocab_layout: Literal["geneformer_v2", "geneformer_v1", "scgpt", "transcriptformer"] = Field(
        "geneformer_v2",
        description="Special tokens before the genes: geneformer_v2 has <pad> <mask> <cls> <eos>, geneformer_v1 "
        "only <pad> <mask>, scgpt <pad> <mask> <cls> <eoc>, transcriptformer <unknown> <pad> <cls> (its START) "
        "<eos> (its END) <rd> <cell> <mask>.",
    )
    gene_medians: str = Field(
        "from_data",
        description="Non-zero median of each gene: from_data (training cells), none, or a table (.csv, .tsv "
        "or .parquet with columns gene_id and median). Used by rank_value.",
    )
    n_bins: int = Field(
        51,
        ge=3,
        description="Bins of binned_expression: 0 for zeros, then quantiles of the cell's non-zeros.",
    )
    bin_ties: Literal["counter", "numpy"] = Field(
        "counter",
        description="How equal values spread over the bins they span: 'counter', a function of (seed, epoch, "
        "cell, gene); 'numpy', numpy's global generator cell by cell, as scGPT does.",
    )
    gene_order: Literal["column", "random", "value"] = Field(
        "column",
        description="Order of the genes of a cell for binned_expression and continuous_projection: as in the "
        "vocabulary, random (new each epoch), or by descending value.",
    )
    overlong: Literal["sample", "first"] = Field(
        "sample",
        description="A cell with more genes than fit (binned_expression, continuous_projection): a random sample "
        "of its genes (new each epoch), or the first ones in gene_order.",
    )
    include_zero_genes: bool = Field(
        False,
        description="Give the model the genes that were measured and have no count, too: continuous_projection after "
        "the others, in the room that these leave; binned_expression among the others, drawn alike where a cell is too "
        "long.",
    )
    max_value: float | None = Field(
        None, gt=0, description="Clip the values of continuous_projection (TranscriptFormer: counts at 30)."
    )
    cls_value: float = Field(
        0.0, description="Value carried at <cls> by binned_expression and continuous_projection."
    )
    obs_tokens: list[str] = Field(
        default_factory=list,
        description="obs columns (assay, ...) given to the model as tokens before the genes; a category that "
        "training did not see is 'unknown'.",
    )
    masking: Masking = Field(default_factory=Masking)

    @field_validator("params", mode="plain")
    @classmethod
    def _params(cls, value: Any, info: ValidationInfo) -> Section | None:
        return plugin_params(registry.TOKENIZERS, info.data.get("strategy"), value)

    @property
    def strategy_like(self) -> str:
        """The built-in strategy that `strategy` is, or stands in for if it is a plugin's."""
        return registry.TOKENIZERS.like(self.strategy)

    @model_validator(mode="after")
    def _specials(self) -> TokenizerConfig:
        if self.vocab_layout == "geneformer_v1" and (self.prepend_cls or self.append_eos):
            raise ValueError(
                "vocab_layout geneformer_v1 has no <cls> and no <eos>: set prepend_cls: false and "
                "append_eos: false, or vocab_layout: geneformer_v2"
            )
        if len(set(self.obs_tokens)) < len(self.obs_tokens):
            raise ValueError(f"obs_tokens names a column twice: {', '.join(self.obs_tokens)}")
        return self


# --- fine-tuning ----------------------------------------------------------------------------------


class HeadConfig(Section):
    """What is predicted from the cell embedding."""

    task: Literal["classification", "regression"] = Field("classification", description="Kind of label.")
    n_classes: int | None = Field(None, ge=2, description="Number of classes; null: from the data.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout before the last layer.")

    @model_validator(mode="after")
    def _classes(self) -> HeadConfig:
        if self.task == "regression" and self.n_classes is not None:
            raise ValueError(
                f"n_classes is {self.n_classes}, but a regression has no classes: set it to null"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) on q, k, v, out and feed-forward layers, through peft."""

    enabled: bool = Field(False, description="Train adapters and head only.")
    rank: int = Field(8, ge=1, description="Rank of the adapters.")
    alpha: float = Field(16, gt=0, description="Scale of the adapters (alpha / rank).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")


class FinetuneConfig(Section):
    """Teach a pretrained model a label."""

    label_key: str = Field("cell_type", description="obs column with the labels.")
    freeze_backbone: bool = Field(False, description="Train the head only.")
    freeze_backbone_epochs: int = Field(0, ge=0, description="Train the head alone for so many epochs first.")
    head: HeadConfig = Field(default_factory=HeadConfig)
    backbone_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of the backbone; null: optimizer.lr."
    )
    head_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of the head; null: optimizer.lr."
    )
    lora: LoraConfig = Field(default_factory=LoraConfig)
    drop_unlabelled: bool = Field(False, description="Leave out cells without a label instead of refusing.")

    @model_validator(mode="after")
    def _together(self) -> FinetuneConfig:
        if self.freeze_backbone and self.lora.enabled:
            raise ValueError("freeze_backbone: true and lora.enabled: true exclude each other")
        if self.freeze_backbone and self.freeze_backbone_epochs:
            raise ValueError(
                "freeze_backbone: true trains the head only, so freeze_backbone_epochs must be 0 "
                f"(it is {self.freeze_backbone_epochs})"
            )
        return self


class Config(Section):
    """A whole YAML file."""

    data: DataConfig = Field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        model = value.get("model") if isinstance(value, dict) else None
        name = model.get("preset") if isinstance(model, dict) else None
        return _laid_under(value, PRESETS[name].settings) if name in PRESETS else value

    @model_validator(mode="after")
    def _together(self) -> Config:
        model, tokenizer = self.model, self.tokenizer
        if model.preset is not None and model.preset not in PRESETS:
            near = [name for name in PRESETS if name.startswith(model.preset.lower())]
            near = near or difflib.get_close_matches(model.preset.lower(), PRESETS, n=1)
            raise ValueError(
                f"model.preset: there is no preset '{model.preset}'"
                + (f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(PRESETS)}")
            )
        require_allowed(tokenizer.strategy, model.architecture, model.pretraining_task)
        if problem := misfit(self) or plugin_misfit(self):
            raise ValueError(problem)
        return self

    @property
    def value_embedding(self) -> str:
        """`model.value_embedding` with its default filled in."""
        if self.model.value_embedding is not None:
            return self.model.value_embedding
        if self.tokenizer.strategy_like == "rank_value" or self.model.count_bias:
            return "none"
        return "soft_bins" if self.model.architecture_like == "masked_autoencoder" else "continuous"

    @property
    def embedding_norm(self) -> bool:
        """`model.embedding_norm` with its default filled in."""
        given = self.model.embedding_norm
        return self.model.architecture_like != "masked_autoencoder" if given is None else given

    @property
    def value_loss(self) -> str:
        """`model.objective.value_loss` with its default filled in."""
        if self.model.objective.value_loss is not None:
            return self.model.objective.value_loss
        if self.model.task_like != "dual_prediction":
            return "mse"
        if self.tokenizer.strategy_like == "binned_expression":
            return "cross_entropy"
        causal = self.model.architecture_like == "autoregressive_transformer"
        return "zero_truncated_poisson" if causal and self.carries_counts else "mse"

    @property
    def carries_counts(self) -> bool:
        """Whether the values beside the genes are counts as measured."""
        preprocessing = self.data.preprocessing
        continuous = self.tokenizer.strategy_like == "continuous_projection"
        return continuous and preprocessing.normalize == "none" and not preprocessing.log1p

    @property
    def obs_columns(self) -> tuple[str, ...]:
        """obs columns that the model reads: tokens first, then the batches."""
        batch_key = self.model.objective.batch_key
        columns = [*self.tokenizer.obs_tokens, *([batch_key] if batch_key else [])]
        return tuple(dict.fromkeys(columns))


def _laid_under(values: Any, defaults: dict[str, Any]) -> Any:
    """Fill what `values` leaves out from `defaults`, section by section."""
    if values is None:
        return defaults
    if not isinstance(values, dict):
        return values
    below = {
        key: _laid_under(values[key], default) if isinstance(default, dict) and key in values else default
        for key, default in defaults.items()
    }
    return {**below, **{k: v for k, v in values.items() if not isinstance(defaults.get(k), dict)}}
