"""Every key that a YAML file may hold: type, default, unit, bounds and help, in one place.

The tree is pydantic, so an unknown key or an impossible value is an error before anything runs.
Reading files, line numbers and overrides live in `config_io`; nothing here touches the disk.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from scmodelforge import registry


class Section(BaseModel):
    """A part of the config. Unknown keys are errors, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yaml(cls, value: Any) -> Any:
        if value is None:
            return {}  # "training:" with nothing below it
        if not isinstance(value, dict):
            return value
        numbers = {key for key, field in cls.model_fields.items() if field.annotation in _NUMBERS}
        # pydantic would take true for 1; as text it is refused
        return {k: str(v).lower() if isinstance(v, bool) and k in numbers else v for k, v in value.items()}


_NUMBERS = (int, float, int | None, float | None)


# --- data -----------------------------------------------------------------------------------------


class HighlyVariableGenes(Section):
    """Keep only the most variable genes, chosen by scanpy on training cells."""

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


class DataConfig(Section):
    """Where the cells come from, and how their genes meet the vocabulary."""

    source: Literal["local"] = Field("local", description="'local': h5ad files on disk.")
    paths: list[str] = Field(
        default_factory=list, description="One or many .h5ad files; gene sets may differ."
    )
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
    min_gene_overlap: float = Field(
        0.2, ge=0, le=1, description="Smallest share of a file's counts that must fall on vocabulary genes."
    )
    preprocessing: Preprocessing = Field(default_factory=Preprocessing)
    split: Split = Field(default_factory=Split)


# --- tokenizer ------------------------------------------------------------------------------------


class Masking(Section):
    """BERT masking (Devlin et al. 2019): what is hidden, and what stands in its place."""

    mask_ratio: float = Field(0.15, gt=0, lt=1, description="Share of a cell's tokens that are asked.")
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
        "rank_value", description="rank_value: genes in order of median-scaled expression (Geneformer)."
    )
    max_genes: int = Field(2048, ge=4, description="Longest input in tokens, CLS and EOS included.")
    prepend_cls: bool = Field(True, description="Begin each cell with <cls>.")
    append_eos: bool = Field(False, description="End each cell with <eos>.")
    vocab_layout: Literal["geneformer_v2", "geneformer_v1"] = Field(
        "geneformer_v2",
        description="Special tokens: v2 has <pad> <mask> <cls> <eos>, v1 only <pad> <mask>; genes follow.",
    )
    gene_medians: str = Field(
        "from_data",
        description="Non-zero median of each gene: from_data (training cells), none, or a table (.csv, .tsv "
        "or .parquet with columns gene_id and median).",
    )
    masking: Masking = Field(default_factory=Masking)

    @model_validator(mode="after")
    def _specials(self) -> TokenizerConfig:
        if self.vocab_layout == "geneformer_v1" and (self.prepend_cls or self.append_eos):
            raise ValueError(
                "vocab_layout geneformer_v1 has no <cls> and no <eos>: set prepend_cls: false and "
                "append_eos: false, or vocab_layout: geneformer_v2"
            )
        return self


# --- model ----------------------------------------------------------------------------------------


class ModelConfig(Section):
    """The transformer."""

    architecture: Annotated[str, AfterValidator(registry.ARCHITECTURES.check)] = Field(
        "transformer_encoder", description="transformer_encoder: bidirectional, BERT-style."
    )
    hidden_dim: int = Field(512, ge=1, description="Width of the hidden states.")
    num_layers: int = Field(12, ge=1, description="Number of transformer blocks.")
    num_heads: int = Field(8, ge=1, description="Attention heads; must divide hidden_dim.")
    ffn_dim: int | None = Field(
        None, ge=1, description="Width of the feed-forward layer; null: 4 × hidden_dim."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout of embeddings and sublayer outputs.")
    attention_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout of attention weights; above 0 it rules out the fast attention kernels.",
    )
    activation: Literal["gelu", "relu"] = Field(
        "gelu", description="Activation of feed-forward layer and head."
    )
    norm: Literal["pre", "post"] = Field(
        "pre", description="LayerNorm before each sublayer (stable) or after it (BERT, Geneformer)."
    )
    layer_norm_eps: float = Field(1e-12, gt=0, description="Epsilon of LayerNorm.")
    pooling: Literal["mean", "cls"] = Field(
        "mean", description="Cell embedding: mean over the cell's genes, or the hidden state of <cls>."
    )
    pretraining_task: Annotated[str, AfterValidator(registry.TASKS.check)] = Field(
        "masked_gene_prediction", description="masked_gene_prediction: name the hidden genes."
    )

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim ({self.hidden_dim}) must be divisible by num_heads ({self.num_heads})"
            )
        return self

    @property
    def feed_forward_dim(self) -> int:
        """Width of the feed-forward layer with its default filled in."""
        return self.ffn_dim or 4 * self.hidden_dim


# --- training -------------------------------------------------------------------------------------


class OptimizerConfig(Section):
    """AdamW or Adam; no weight decay on biases, norms and (by default) embeddings."""

    name: Literal["adamw", "adam"] = Field("adamw", description="adamw (decoupled weight decay) or adam.")
    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of the weight matrices.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Decay rates of the moment estimates.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    decay_embeddings: bool = Field(False, description="Apply weight decay to embedding tables too.")

    @model_validator(mode="after")
    def _betas(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {list(self.betas)}")
        return self


class SchedulerConfig(Section):
    """Learning rate over the run; its length follows the length of the run."""

    name: Literal["cosine_warmup", "cosine", "linear", "constant"] = Field(
        "cosine_warmup",
        description="cosine_warmup, cosine (no warm-up unless given), linear (decay) or constant.",
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="Optimizer steps of linear warm-up, at most a tenth of the run; null: a tenth of the run "
        "(at most 2,000) for cosine_warmup, else 0.",
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Final over peak learning rate.")


class TrainingConfig(Section):
    """How long, how fast, on what, and what is left behind."""

    batch_size: int = Field(64, ge=1, description="Cells per step and device.")
    max_epochs: int = Field(10, ge=1, description="Passes over the training cells.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after so many optimizer steps; null: no limit."
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of order, masks, weights and dropout.")
    num_gpus: int | None = Field(None, ge=0, description="GPUs to use; null: all there are, 0: the CPU.")
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = Field(
        "32-true", description="Arithmetic of the forward and backward pass."
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    gradient_clip_val: float | None = Field(
        1.0, gt=0, description="Largest gradient norm; null: no clipping."
    )
    accumulate_grad_batches: int = Field(1, ge=1, description="Batches per optimizer step.")
    logger: Literal["csv", "wandb", "tensorboard"] = Field(
        "csv", description="Where figures go; metrics.csv in the run folder is always written."
    )
    wandb_project: str = Field("scmodelforge", description="Weights & Biases project.")
    run_dir: str | None = Field(None, description="Folder of this run; null: runs/DATE-TIME.")
    checkpoint_dir: str | None = Field(
        None, description="Folder of the checkpoints; null: RUN_DIR/checkpoints."
    )
    checkpoint_every_n_steps: int | None = Field(
        None, ge=1, description="Also write last.ckpt every so many optimizer steps; null: once an epoch."
    )
    save_top_k: int = Field(
        1, ge=1, description="How many of the best checkpoints to keep (best.ckpt is one)."
    )
    log_every_n_steps: int = Field(10, ge=1, description="Optimizer steps between two logged figures.")
    loader_threads: int = Field(2, ge=1, description="Threads that read and tokenize ahead of the model.")


# --- evaluation -----------------------------------------------------------------------------------


class LinearProbeParams(Section):
    """Logistic regression on frozen embeddings."""

    cell_type_key: str = Field("cell_type", description="obs column with the labels.")
    test_size: float = Field(0.2, gt=0, lt=1, description="Share of cells (or groups) held out for testing.")
    group_key: str | None = Field(
        None, description="obs column whose groups stay whole; null: split by cell."
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


BenchmarkSpec = Annotated[LinearProbeSpec | EmbeddingQualitySpec, Field(discriminator="name")]


def _only_linear_probe() -> list[BenchmarkSpec]:
    return [LinearProbeSpec(name="linear_probe")]


class EvalConfig(Section):
    """Which benchmarks run, and how cells are embedded for them."""

    batch_size: int = Field(256, ge=1, description="Cells per batch while embedding.")
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of splits, subsampling and the untrained baseline."
    )
    baselines: list[Literal["pca", "untrained"]] = Field(
        ["pca", "untrained"],
        description="Beside the model: PCA of log-normalized counts, and the model before training.",
    )
    benchmarks: list[BenchmarkSpec] = Field(default_factory=_only_linear_probe, description="What to run.")


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
