"""The loss over the vocabulary, made of some rows of logits at a time, is the plain cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from scmodelforge.models import gene_prediction
from scmodelforge.models.gene_prediction import GenePrediction, linear_cross_entropy

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


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("n", [1, 7, 23])
def test_loss_and_gradients_are_those_of_all_logits(
    n: int, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gene_prediction, "ROWS_ON_CPU", 4)
    monkeypatch.setattr(gene_prediction, "ROWS_BY_TORCH", 3)
    ours, theirs = prediction(n, soft_cap), prediction(n, soft_cap)
    loss = ours.cross_entropy(genes(n), IGNORED)
    logits = theirs.logits.double()
    expected = F.cross_entropy(logits, genes(n), ignore_index=IGNORED, reduction="sum").float()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    (2 * loss).backward()
    (2 * expected).backward()
    for name in ("states", "weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours.cross_entropy(genes(n), IGNORED), expected)


@pytest.mark.parametrize("half", [True, False])
def test_nothing_asked_is_no_loss_and_no_gradient(half: bool) -> None:
    nothing = prediction(0, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = nothing.cross_entropy(genes(0), IGNORED)
    loss.backward()
    assert loss.item() == 0
    assert not nothing.weight.grad.any()


def test_what_is_ignored_is_no_loss_and_no_gradient() -> None:
    ignored = prediction(5, 3.0)
    loss = ignored.cross_entropy(torch.full((5,), IGNORED), IGNORED)
    loss.backward()
    assert loss.item() == 0
    for name in ("states", "weight", "bias"):
        assert not getattr(ignored, name).grad.any()


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("n", [1, 7, 23])
def test_half_precision_loses_no_more_than_its_rounding(
    n: int, soft_cap: float | None, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gene_prediction, "ROWS_ON_CPU", 5)
    monkeypatch.setattr(gene_prediction, "ROWS_BY_TORCH", 3)
    whole, half = prediction(n, soft_cap), prediction(n, soft_cap)
    right = genes(n + 1)[1:]  # the first is ignored
    exact = whole.cross_entropy(right, IGNORED)
    with torch.autocast("cpu", torch.bfloat16):
        loss = half.cross_entropy(right, IGNORED)
    (3 * exact).backward()
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    assert loss != exact, "computed in half precision"
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    for name in ("states", "weight", "bias"):
        ours, theirs = getattr(half, name).grad, getattr(whole, name).grad
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max(), name


@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_the_loss_in_half_precision_is_that_of_its_logits(soft_cap: float | None) -> None:
    half = prediction(23, soft_cap)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(half.logits.float(), genes(23), ignore_index=IGNORED, reduction="sum")
        torch.testing.assert_close(half.cross_entropy(genes(23), IGNORED), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("half", [True, False])
def test_what_is_not_a_number_stays_so(half: bool) -> None:
    broken = prediction(23, None)
    never_right = next(gene for gene in range(1, N_TOKENS) if gene not in genes(23))
    with torch.no_grad():
        broken.bias[never_right] = torch.nan
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = broken.cross_entropy(genes(23), IGNORED)
    loss.backward()
    assert loss.isnan()
    assert broken.bias.grad.isnan().all()


@pytest.mark.parametrize("frozen", ["states", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    part = prediction(7, None)
    getattr(part, frozen).requires_grad_(False)
    part.cross_entropy(genes(7), IGNORED).backward()
    for name in ("states", "weight", "bias"):
        assert (getattr(part, name).grad is None) == (name == frozen)


def test_the_output_matrix_may_be_that_of_the_embedding() -> None:
    def tied(loss_of) -> torch.Tensor:
        start = prediction(7, None)
        looked_up = F.embedding(torch.arange(7), start.weight)
        loss_of(GenePrediction(looked_up, start.weight, start.bias, None)).backward()
        return start.weight.grad

    ours = tied(lambda part: part.cross_entropy(genes(7), IGNORED))
    theirs = tied(lambda part: F.cross_entropy(part.logits, genes(7), ignore_index=IGNORED, reduction="sum"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


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


def test_a_gene_that_is_all_but_impossible_has_a_loss_and_a_gradient() -> None:
    weight = torch.tensor([[200.0], [0.0], [-200.0]])
    states, genes = torch.ones(2, 1, requires_grad=True), torch.tensor([2, 0])
    loss = linear_cross_entropy(states, weight, torch.zeros(3), genes, ignored=-1)
    assert loss.item() == pytest.approx(400.0)
    loss.backward()
    torch.testing.assert_close(states.grad, torch.tensor([[400.0], [0.0]]))
