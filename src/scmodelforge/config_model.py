"""The `model` section of a config: architecture, sizes, heads, and the pretraining task with its options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from scmodelforge import registry
from scmodelforge.config_plugins import plugin_params
from scmodelforge.config_section import Section


class ObjectiveConfig(Section):
    """Options of the pretraining task: loss weights and auxiliary losses."""

    gene_weight: float = Field(1.0, ge=0, description="Weight of the gene loss (cross-entropy).")
    value_weight: float = Field(1.0, ge=0, description="Weight of the expression loss.")
    value_loss: Literal["mse", "cross_entropy", "zero_truncated_poisson"] | None = Field(
        None,
        description="Expression loss: mse of the value, cross_entropy over the bins (binned_expression), or "
        "zero_truncated_poisson of the counts (continuous_projection of counts, autoregressive); null: mse, and for "
        "dual_prediction cross_entropy with bins and, autoregressive, zero_truncated_poisson with counts.",
    )
    reference: bool = Field(
        False,
        description="Compute the autoregressive losses as TranscriptFormer's code does: <eos> only where the window "
        "is full, gene loss averaged over padding too, approximate normalization of the Poisson loss; and generate "
        "values as scGPT's code does: without the out projection of the generated genes' attention.",
    )
    zero_probability: bool = Field(
        False, description="Also predict the probability that a value is not zero (scGPT's explicit zeros)."
    )
    zero_mask_ratio: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="masked_autoencoder: share of the measured genes without a count that are asked, too "
        "(scFoundation).",
    )
    generated_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="autoregressive expression_reconstruction: share of a cell's genes whose values are generated.",
    )
    second_pass_weight: float = Field(
        0.0,
        ge=0,
        description="autoregressive expression_reconstruction: weight of generating the values once more, with the "
        "cell embedding in the place of <cls> (scGPT).",
    )
    cell_weight: float = Field(
        0.0, ge=0, description="Weight of predicting the values from the cell embedding (scGPT's MVC, GEPC)."
    )
    ecs_weight: float = Field(0.0, ge=0, description="Weight of scGPT's elastic cell similarity.")
    ecs_threshold: float = Field(
        0.8,
        ge=-1,
        le=1,
        description="Cosine similarity above which ECS draws cells together, and below which apart.",
    )
    batch_key: str | None = Field(
        None, description="obs column with the batches, for batch_weight and batch_labels."
    )
    batch_weight: float = Field(
        0.0, ge=0, description="Weight of the batch classifier behind a gradient reversal (scGPT's DAB)."
    )
    batch_labels: bool = Field(
        False, description="Tell the expression decoder the batch of the cell (scGPT)."
    )

    @model_validator(mode="after")
    def _batches(self) -> ObjectiveConfig:
        if (self.batch_weight or self.batch_labels) and self.batch_key is None:
            raise ValueError("batch_weight and batch_labels need batch_key, the obs column with the batches")
        if self.batch_key is not None and not (self.batch_weight or self.batch_labels):
            raise ValueError("batch_key has no effect without batch_weight or batch_labels")
        return self


class DecoderConfig(Section):
    """The light decoder of `masked_autoencoder`."""

    hidden_dim: int | None = Field(None, ge=1, description="Width; null: that of the encoder.")
    num_layers: int = Field(2, ge=1, description="Number of transformer blocks.")
    num_heads: int | None = Field(None, ge=1, description="Attention heads; null: as the encoder.")


class ModelConfig(Section):
    """The transformer."""

    preset: str | None = Field(
        None,
        description="A published size, which sets tokenizer, architecture and task; keys written beside it win. "
        "'scmodelforge strategies' lists them.",
    )
    architecture: Annotated[str, AfterValidator(registry.ARCHITECTURES.check)] = Field(
        "transformer_encoder",
        description="transformer_encoder: bidirectional (BERT, scGPT); autoregressive_transformer: causal (GPT, "
        "TranscriptFormer); masked_autoencoder: encoder of the visible genes and light decoder (scFoundation).",
    )
    params: SerializeAsAny[Section] | None = Field(
        None, description="Keys that an architecture from a plugin has of its own."
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
    norm: Literal["pre", "post", "normed_residual"] = Field(
        "pre",
        description="LayerNorm before each sublayer (stable), after it (BERT, Geneformer, scGPT), or before it with "
        "the residual taken from the normed input (TranscriptFormer).",
    )
    final_norm: bool | None = Field(
        None, description="LayerNorm after the last block; null: with norm pre only."
    )
    layer_norm_eps: float = Field(1e-12, gt=0, description="Epsilon of LayerNorm.")
    bias: bool = Field(True, description="Biases in attention and feed-forward layers.")
    qk_norm: bool = Field(
        False,
        description="LayerNorm of each head's queries and keys, which bounds attention scores (ViT-22B).",
    )
    soft_cap: float | None = Field(
        None, gt=0, description="Squash attention scores and gene logits to ± this (TranscriptFormer: 10)."
    )
    count_bias: bool = Field(
        False,
        description="autoregressive: add log(1 + count) of a gene to the attention it gets (TranscriptFormer).",
    )
    value_embedding: Literal["none", "continuous", "category", "scaling", "soft_bins"] | None = Field(
        None,
        description="How the values enter: none; continuous, a two-layer network (scGPT); category, a vector per bin; "
        "scaling, the gene vector times the value; soft_bins, a mixture of learned vectors (scFoundation). null: none "
        "with rank_value or count_bias, soft_bins for masked_autoencoder, else continuous.",
    )
    soft_bins: int = Field(100, ge=2, description="Learned vectors of value_embedding soft_bins.")
    embedding_norm: bool | None = Field(
        None,
        description="LayerNorm on gene and value embeddings; null: yes, except for masked_autoencoder.",
    )
    gene_embeddings: str | None = Field(
        None,
        description="File with a vector per gene id (.safetensors, .npz, .h5), such as ESM-2 embeddings, that a small "
        "network turns into gene embeddings; null: learned.",
    )
    gene_embedding_dim: int | None = Field(
        None, ge=1, description="Width of those vectors; null: learned gene embeddings, or as in the file."
    )
    train_gene_embeddings: bool = Field(False, description="Train the vectors of gene_embeddings too.")
    gene_head: Literal["tied", "mlp"] = Field(
        "tied",
        description="Gene prediction: BERT's head with the gene embedding as output matrix, or a network of its own.",
    )
    gene_head_dim: int | None = Field(
        None, ge=1, description="Hidden width of gene_head mlp; null: hidden_dim."
    )
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    pooling: Literal["mean", "cls", "window"] = Field(
        "mean",
        description="Cell embedding: mean over the cell's genes, the hidden state of <cls>, or window, the sum over "
        "all tokens divided by the longest input (TranscriptFormer).",
    )
    normalize_embedding: bool = Field(
        False, description="Scale cell embeddings to length 1, as scGPT's embed_data does."
    )
    pretraining_task: Annotated[str, AfterValidator(registry.TASKS.check)] = Field(
        "masked_gene_prediction",
        description="masked_gene_prediction: name the hidden genes; expression_reconstruction: tell the hidden values; "
        "dual_prediction: both; next_gene: name the gene that comes next (autoregressive).",
    )
    task_params: SerializeAsAny[Section] | None = Field(
        None, description="Keys that a pretraining task from a plugin has of its own."
    )
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)

    @field_validator("params", mode="plain")
    @classmethod
    def _params(cls, value: Any, info: ValidationInfo) -> Section | None:
        return plugin_params(registry.ARCHITECTURES, info.data.get("architecture"), value)

    @field_validator("task_params", mode="plain")
    @classmethod
    def _task_params(cls, value: Any, info: ValidationInfo) -> Section | None:
        return plugin_params(registry.TASKS, info.data.get("pretraining_task"), value)

    @property
    def architecture_like(self) -> str:
        """The built-in architecture that `architecture` is, or stands in for if it is a plugin's."""
        return registry.ARCHITECTURES.like(self.architecture)

    @property
    def task_like(self) -> str:
        """The built-in task that `pretraining_task` is, or stands in for if it is a plugin's."""
        return registry.TASKS.like(self.pretraining_task)

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim ({self.hidden_dim}) must be divisible by num_heads ({self.num_heads})"
            )
        width, heads = self.decoder_dim, self.decoder.num_heads or self.num_heads
        if self.architecture == "masked_autoencoder" and width % heads:
            raise ValueError(
                f"decoder: its hidden_dim ({width}) must be divisible by its num_heads ({heads})"
            )
        return self

    @property
    def feed_forward_dim(self) -> int:
        """Width of the feed-forward layer with its default filled in."""
        return self.ffn_dim or 4 * self.hidden_dim

    @property
    def decoder_dim(self) -> int:
        """Width of the decoder with its default filled in."""
        return self.decoder.hidden_dim or self.hidden_dim
