"""The `training` section of a config: length, optimizer, schedule, machine, and what is left behind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scmodelforge.config_section import Section


class OptimizerConfig(Section):
    """AdamW, Adam or Muon; no weight decay on biases, norms and (by default) embeddings."""

    name: Literal["adamw", "adam", "muon"] = Field(
        "adamw",
        description="adamw (decoupled weight decay), adam, or muon (for matrices of the blocks; adamw for the rest).",
    )
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
    tokens_per_batch: Annotated[int, Field(ge=1, lt=2**31)] | Literal["auto"] | None = Field(
        None,
        description="Tokens per step and device, special and obs tokens included: a batch holds as many whole cells as "
        "fit; auto: the most that fit into memory (train, in one process); null: batch_size says how many cells.",
    )
    max_epochs: int = Field(10, ge=1, description="Passes over the training cells.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after so many optimizer steps; null: no limit."
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of order, masks, weights and dropout.")
    num_gpus: int | None = Field(None, ge=0, description="GPUs to use; null: all there are, 0: the CPU.")
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="How several processes share the work: ddp, each has the whole model; fsdp, weights, gradients and "
        "optimizer state are divided over them (less memory, more communication).",
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = Field(
        "32-true", description="Arithmetic of the forward and backward pass; weights are float32 in any case."
    )
    compile: bool = Field(
        False,
        description="Compile the pretraining step with torch.compile: faster steps after up to a minute at the start.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Compute what is inside the blocks again in the backward pass instead of keeping it: less memory "
        "for a third more work.",
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

    @property
    def token_budget(self) -> int | None:
        """`tokens_per_batch`, once auto has become a number."""
        if self.tokens_per_batch == "auto":
            raise ValueError("training.tokens_per_batch is still auto: no number was chosen")
        return self.tokens_per_batch

    @model_validator(mode="after")
    def _sharded(self) -> TrainingConfig:
        if self.strategy == "fsdp" and self.compile:
            raise ValueError("compile: true and strategy fsdp do not go together: use strategy ddp")
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise ValueError(
                "strategy fsdp does not scale losses, which precision 16-mixed needs: use bf16-mixed or 32-true"
            )
        if self.strategy == "fsdp" and self.optimizer.name == "muon":
            raise ValueError(
                "optimizer.name muon needs whole matrices, and strategy fsdp divides them: use strategy ddp, or adamw"
            )
        return self
