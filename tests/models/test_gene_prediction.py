"""The loss over the vocabulary, made of some rows of logits at a time, is the plain cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from scmodelforge.models import gene_prediction
from scmodelforge.models.gene_prediction import GenePrediction

N_TOKENS, WIDTH, IGNORED = 50, 6, 0


def prediction(n: int, soft_cap: float | None) -> GenePrediction:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, WIDTH), (N_TOKENS, WIDTH), (N_TOKENS,))
    parts = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    return GenePrediction(*parts, soft_cap)


def genes(n: int) -> torch.Tensor:
    found = torch.randint(1, N_TOKENS, (n,), generator=torch.Generator().manual_seed(1))
    found[::5] = IGNORED
    return found


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("n", [1, 7, 23])
def test_loss_and_gradients_are_those_of_all_logits(
    n: int, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gene_prediction, "ROWS_ON_CPU", 4)
    ours, theirs = prediction(n, soft_cap), prediction(n, soft_cap)
    loss = ours.cross_entropy(genes(n), IGNORED)
    expected = F.cross_entropy(theirs.logits, genes(n), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (2 * loss).backward()
    (2 * expected).backward()
    for name in ("states", "weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours.cross_entropy(genes(n), IGNORED), expected)


def test_nothing_asked_is_no_loss_and_no_gradient() -> None:
    nothing = prediction(0, None)
    loss = nothing.cross_entropy(genes(0), IGNORED)
    loss.backward()
    assert loss.item() == 0
    assert not nothing.weight.grad.any()


def test_half_precision_loses_no_more_than_its_rounding() -> None:
    exact = prediction(23, None).cross_entropy(genes(23), IGNORED)
    with torch.autocast("cpu", torch.bfloat16):
        half = prediction(23, None)
        loss = half.cross_entropy(genes(23), IGNORED)
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest result holds."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def test_all_logits_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gene_prediction, "ROWS_ON_CPU", 8)
    with Largest() as seen:
        prediction(400, None).cross_entropy(genes(400), IGNORED).backward()
    assert seen.size <= 400 * WIDTH < 400 * N_TOKENS


def test_some_rows_at_a_time_give_the_logits_of_the_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gene_prediction, "ROWS_ON_CPU", 4)
    found = prediction(11, 3.0)
    parts = list(found.chunks(genes(10)))
    torch.testing.assert_close(torch.cat([logits for logits, _ in parts]), found.logits[:10])
    assert torch.equal(torch.cat([truth for _, truth in parts]), genes(10))
