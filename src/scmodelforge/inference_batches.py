"""Cells through a model: in their order, in batches of at most so many tokens, in memory that does not grow.

What a batch costs is what its tokens cost, so it takes as many cells as fit a budget of tokens: long cells come with
few others, and a batch of a few thousand tokens is computed at once however short its cells are. Threads read and
tokenize ahead. Where the memory is too small, the budget is halved until a batch fits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from scmodelforge.data.batch import REPEAT, MeasuredGenes
from scmodelforge.data.loader import BatchLoader
from scmodelforge.data.store import CellStore
from scmodelforge.errors import UserError
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.models.transformer import rounded_residuals
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import PackedTokens

log = logging.getLogger(__name__)

THREADS = max(2, min(8, (os.cpu_count() or 2) // 2))
BUDGET = {"cuda": 65_536, "large cuda": 262_144, "cpu": 16_384}  # tokens of a batch
LARGE = 40 * 2**30  # bytes of a GPU, of which the widest published models then take a fourth
COMPILED_FROM = 500_000  # cells on a GPU; with fewer, compiling takes longer than it saves
PRECISIONS = ("32", "bf16", "bf16-true")


def default_device() -> str:
    """The first GPU, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision_for(asked: str | None, device: str) -> str:
    """The precision to compute in: as asked; None: "bf16" on a GPU that has it, else "32".

    "bf16" rounds factors of products alone; "bf16-true" also what a block hands to the next one, as a model in bfloat16
    does.

    Raises
    ------
    UserError
        If there is no such precision, or `device` computes in bf16 no faster.
    """
    if asked not in (None, *PRECISIONS):
        raise UserError(f"precision is '{asked}'; it must be 32, bf16 or bf16-true.")
    on_gpu = device.startswith("cuda")
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else bf16_on_cpu()
    if asked not in (None, "32") and not fast:
        what = "GPU" if on_gpu else "processor (without AVX512-BF16 or AMX)"
        raise UserError(
            f"precision {asked}: this {what} does not compute in it, so it would be slower and less exact.\n"
            "Leave precision out, or take 32."
        )
    return asked or ("bf16" if on_gpu and fast else "32")


def bf16_on_cpu() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware: AVX512-BF16 or AMX."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # which early versions of torch lack
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


class Computed(NamedTuple):
    """What a model computed of some cells.

    Attributes
    ----------
    values
        float32 (n_cells, width).
    n_empty
        How many of the cells have no gene that the model knows.
    """

    values: np.ndarray
    n_empty: int


def compute_cells(
    bundle: ModelBundle,
    store: CellStore,
    rows: np.ndarray,
    compute: Callable[[PackedTokens], torch.Tensor],
    *,
    batch_size: int,
    device: str,
    precision: str,
) -> Iterator[Computed]:
    """What `compute` makes of the given rows of a store, in their order, `batch_size` cells at a time.

    Parameters
    ----------
    compute
        Packed tokens on `device` → (n_cells, width).
    batch_size
        Most cells of a batch.
    precision
        As `precision_for` gives it.

    Raises
    ------
    UserError
        If a cell alone does not fit into the memory.
    """
    if device.startswith("cuda") and len(rows) >= COMPILED_FROM:
        log.info("Compiling the model, which takes some twenty seconds and pays with so many cells.")
        compute = torch.compile(compute, dynamic=True)
    run = FittingBatches(compute, bundle.model, device, precision)
    rows = np.ascontiguousarray(rows, dtype=np.int64)  # torch takes no reversed view
    before: tuple[Fetched, int] | None = None
    for parts in batches_of(bundle, store, rows, batch_size, run.parts):
        fetched = Fetched(run(parts))
        if before is not None:  # waited for only now, when a GPU has the next batch
            yield Computed(before[0].numpy(), before[1])
        before = fetched, sum(part.n_empty for part in parts)
    if before is not None:
        yield Computed(before[0].numpy(), before[1])


class Fetched:
    """Values on their way to the CPU; what a GPU is asked for after them is not waited for."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.float().to("cpu", non_blocking=values.is_cuda)
        self.arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def numpy(self) -> np.ndarray:
        """float32, when they have arrived; a copy, as memory that a GPU writes to is scarce."""
        if self.arrived is None:
            return self.values.numpy()
        self.arrived.synchronize()
        return self.values.numpy().copy()


Made = TypeVar("Made")


def batches_of(
    bundle: ModelBundle,
    store: CellStore,
    rows: np.ndarray,
    batch_size: int,
    prepare: Callable[[TokenBatch], Made],
) -> Iterator[Made]:
    """What `prepare` makes of the tokens of the given rows, in their order; threads do it ahead of the model."""
    tokenizer = build_tokenizer(bundle.config, bundle.vocab)
    in_order = (
        bundle.config.tokenizer.bin_ties == "numpy"
    )  # numpy's generator serves one cell after the other

    def make(epoch: int, step: int) -> Made:
        return prepare(tokenizer(store.read(rows[step * batch_size : (step + 1) * batch_size])))

    yield from BatchLoader(make, -(-len(rows) // batch_size), 1 if in_order else THREADS)


def token_batches(
    bundle: ModelBundle, store: CellStore, rows: np.ndarray, batch_size: int
) -> Iterator[TokenBatch]:
    """Token batches of the given rows of a store, in their order, made by threads ahead of the model."""
    return batches_of(bundle, store, rows, batch_size, lambda tokens: tokens)


class Part(NamedTuple):
    """Some cells of a batch, as tokens and packed for the model; how many of them have no gene that it knows."""

    cells: TokenBatch
    packed: PackedTokens
    n_empty: int


class FittingBatches:
    """Computes something of each cell of a batch, by parts that fit a budget of tokens, which memory decides.

    Attributes
    ----------
    budget
        Most tokens at once; halved whenever the memory was too small.
    """

    def __init__(
        self,
        compute: Callable[[PackedTokens], torch.Tensor],
        model: CellTransformer,
        device: str,
        precision: str,
    ) -> None:
        self.compute, self.model = compute, model
        self.device = torch.device(device)
        self.precision = precision
        self.budget = BUDGET[_kind(self.device)]

    def parts(self, tokens: TokenBatch) -> list[Part]:
        """The cells of a batch in parts that fit the budget; called from threads."""
        cells = within_budget(tokens, self.budget)
        packed = [self.model.readable(part) for part in cells]
        if self.device.type == "cuda":
            packed = [part.pin_memory() for part in packed]
        return [Part(*both, self._n_empty(both[0])) for both in zip(cells, packed, strict=True)]

    def _n_empty(self, tokens: TokenBatch) -> int:
        expressed = (tokens.values > 0) & (tokens.input_ids >= self.model.first_gene_token)
        return int((~expressed.any(dim=1)).sum())

    def __call__(self, batch: TokenBatch | list[Part]) -> torch.Tensor:
        """Return (n_cells, width) on the device for a batch on the CPU, or for its parts."""
        done, waiting = [], self.parts(batch) if isinstance(batch, TokenBatch) else batch
        while waiting:
            part, *waiting = waiting
            if len(within_budget(part.cells, self.budget)) > 1:  # it was made before the budget was halved
                waiting = [*self.parts(part.cells), *waiting]
                continue
            computed = self._try(part)
            if computed is None:
                self._back_off(part.cells)
                waiting = [part, *waiting]
            else:
                done.append(computed)
        return done[0] if len(done) == 1 else torch.cat(done)

    @torch.inference_mode()
    def _try(self, part: Part) -> torch.Tensor | None:
        """Return what is computed, or None if the memory is too small."""
        try:
            with (
                rounded_residuals(self.model, self.precision == "bf16-true"),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "32"),
            ):
                return self.compute(part.packed.arriving(self.device))
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return None  # and not a second try here: the error holds on to the tensors of the first one

    def _back_off(self, part: TokenBatch) -> None:
        n_tokens = int(part.lengths.sum())
        if part.n_cells == 1:
            cell = int(part.cell_index[0]) % REPEAT
            raise UserError(
                f"The memory of {self.device.type} is too small for a single cell: cell {cell} with "
                f"{n_tokens:,} tokens.\nEnd other programs that use it, or take a machine with more memory."
            )
        self.budget = max(n_tokens // 2, 1)
        log.warning(
            "Out of memory with %s tokens of %s cells at once: from here on at most %s tokens.",
            f"{n_tokens:,}",
            f"{part.n_cells:,}",
            f"{self.budget:,}",
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _kind(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    return "large cuda" if torch.cuda.get_device_properties(device).total_memory >= LARGE else "cuda"


def _is_out_of_memory(error: RuntimeError) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED"))


def within_budget(tokens: TokenBatch, budget: int) -> list[TokenBatch]:
    """The cells of a batch on the CPU in batches of at most `budget` tokens; a cell with more comes alone.

    They are as few as there can be, and of similar sizes but for a cell, as a few cells are computed hardly faster than
    many.
    """
    lengths = np.maximum(tokens.lengths.numpy(), 1)
    if lengths.sum() <= budget:
        return [tokens]
    n_batches = len(_ends(lengths, budget))
    even = -(-int(lengths.sum()) // n_batches) + int(lengths.max()) - 1  # with which they are no more
    ends = _ends(lengths, min(budget, even))
    return [some_cells(tokens, slice(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _ends(lengths: np.ndarray, budget: int) -> list[int]:
    """Where batches end that take the next cells as long as these fit."""
    total, ends = np.cumsum(lengths), [0]
    while ends[-1] < len(lengths):
        used = int(total[ends[-1] - 1]) if ends[-1] else 0
        ends.append(max(ends[-1] + 1, int(np.searchsorted(total, used + budget, side="right"))))
    return ends[1:]


def some_cells(tokens: TokenBatch, cells: slice | torch.Tensor) -> TokenBatch:
    """Some cells of a batch (a slice, or int64 rows), padded to the longest of them."""
    lengths = tokens.lengths[cells]
    length = max(int(lengths.max()), 1)
    optional = {name: getattr(tokens, name) for name in ("obs", "bin_edges", "left_out")}
    measured = tokens.measured
    return replace(
        tokens,
        input_ids=tokens.input_ids[cells, :length].contiguous(),
        values=tokens.values[cells, :length].contiguous(),
        lengths=lengths,
        cell_index=tokens.cell_index[cells],
        has_padding=bool((lengths < length).any()),
        measured=measured and MeasuredGenes(measured.sets, measured.of_cell[cells]),
        **{name: None if value is None else value[cells] for name, value in optional.items()},
    )


def warn_of_empty(n_cells: int, what: str) -> None:
    """Say that some cells have no gene that the model knows."""
    if n_cells:
        log.warning(
            "%s cells have no gene that the model knows: their %s says nothing.", f"{n_cells:,}", what
        )
