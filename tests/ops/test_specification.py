"""The loss, its terms and its derivatives against the formulas, written out row by row."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emu_kernels import (
    EMULoss,
    emu_mutate,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
    mask,
    uls_cross_entropy,
)
from tests.ops.support import LOSS, Inputs, Options, assert_near, evaluate, make

# A single row; a set for each row; sets for blocks of rows, one of them all padding; one set for
# the batch, with more negatives than the table has rows; no negatives.
SHAPES: list[Options] = [
    {"batch": 1, "count": 1, "dim": 1},
    {"batch": 4, "count": 7, "dim": 19, "padding": True},
    {"batch": 6, "count": 5, "dim": 33, "groups": 3, "padding": True},
    {"batch": 4, "count": 30, "dim": 16, "groups": 1},
    {"batch": 3, "count": 0, "dim": 5},
]
COEFFICIENTS = [(0.25, 0.73), (0.0, 0.5), (0.4, 0.0), (0.0, 0.0), (3.0, 2.0)]


class Answer(NamedTuple):
    uls: Tensor  # (B,)
    vanilla: Tensor  # (B,)
    query: Tensor  # (B, D) gradient of the sum of the rows' losses
    table: Tensor  # (N, D)


def softmax(scores: list[float]) -> tuple[list[float], float]:
    top = max(scores)
    total = sum(math.exp(s - top) for s in scores)
    return [math.exp(s - top) / total for s in scores], top + math.log(total)


def by_hand(inputs: Inputs, *, rate: float, beta: float, alpha: float, seed: int) -> Answer:
    """EMU's formulas and their derivatives, one row at a time."""
    query, table, positive, negative = inputs
    batch, per_set = query.shape[0], query.shape[0] // negative.shape[0]
    drawn = mask.mutation_mask(
        batch,
        negative.shape[1],
        query.shape[1],
        seed=torch.tensor(seed),
        row_offset=0,
        threshold=round(256 * rate),
    ).double()
    uls, vanilla = torch.zeros(batch).double(), torch.zeros(batch).double()
    grad_query, grad_table = torch.zeros_like(query), torch.zeros_like(table)
    for b in range(batch):
        q, z_pos = query[b], table[positive[b]]
        columns = [(k, int(n)) for k, n in enumerate(negative[b // per_set]) if n >= 0]
        count = len(columns)
        if count == 0:
            continue
        lam = [drawn[b, k] for k, _ in columns]
        z_neg = [table[n] for _, n in columns]
        z_mut = [m * z_pos + (1 - m) * z for m, z in zip(lam, z_neg, strict=True)]
        s_pos, s_neg, s_mut = ([float(q @ z) for z in zs] for zs in ([z_pos], z_neg, z_mut))
        p, lse = softmax(s_pos + s_neg)
        p_hat, lse_hat = softmax(s_pos + s_mut)
        uls[b] = ((lse_hat - s_pos[0]) + beta * sum(lse_hat - s for s in s_mut)) / count
        vanilla[b] = lse - s_pos[0]
        w_pos = ((1 + beta * count) * p_hat[0] - 1) / count + alpha * (p[0] - 1)
        grad_query[b] += w_pos * z_pos
        grad_table[positive[b]] += w_pos * q
        for i, (_, n) in enumerate(columns):
            w_hat = ((1 + beta * count) * p_hat[1 + i] - beta) / count
            w = alpha * p[1 + i]
            grad_query[b] += w * z_neg[i] + w_hat * z_mut[i]
            grad_table[positive[b]] += w_hat * lam[i] * q
            grad_table[n] += (w + w_hat * (1 - lam[i])) * q
    return Answer(uls, vanilla, grad_query, grad_table)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("beta", "alpha"), COEFFICIENTS)
def test_loss_and_derivatives(
    shape: Options, beta: float, alpha: float, backend: str, device: torch.device
) -> None:
    inputs = make(dtype=torch.float64, **shape)
    answer = by_hand(inputs, rate=0.61, beta=beta, alpha=alpha, seed=77)
    options: Options = {"mutation_rate": 0.61, "beta": beta, "alpha": alpha, "seed": 77}
    result = evaluate(
        fused_emu_loss, inputs.to(device), reduction="none", backend=backend, **options
    )
    assert_near(result.outputs[0], answer.uls + alpha * answer.vanilla)
    assert_near(result.query, answer.query)
    assert_near(result.table, answer.table)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_module_keeps_the_terms(shape: Options, backend: str, device: torch.device) -> None:
    inputs = make(dtype=torch.float64, **shape)
    answer = by_hand(inputs, rate=0.61, beta=0.25, alpha=0.73, seed=77)
    weight = torch.linspace(0.5, 2, inputs.query.shape[0], dtype=torch.float64)
    module = EMULoss(mutation_rate=0.61, beta=0.25, alpha=0.73, backend=backend)
    query = inputs.to(device).query.requires_grad_()
    loss = module(query, *inputs.to(device)[1:], sample_weight=weight.to(device), seed=77)
    terms = module.last_terms
    assert terms is not None
    assert terms.shape == (2,)
    assert not terms.requires_grad
    means = [(weight * term).sum() / weight.sum() for term in (answer.uls, answer.vanilla)]
    assert_near(terms, torch.stack(means))
    assert_near(loss.detach(), means[0] + 0.73 * means[1])


def test_module_is_the_function(backend: str, device: torch.device) -> None:
    inputs = make(device=device)
    module = EMULoss(mutation_rate=0.5, beta=0.3, alpha=0.2, reduction="none", backend=backend)
    assert module.last_terms is None
    torch.testing.assert_close(
        module(*inputs, seed=5, row_offset=2),
        fused_emu_loss(
            *inputs, **LOSS | {"seed": 5}, row_offset=2, reduction="none", backend=backend
        ),
        rtol=0,
        atol=0,
    )
    module.beta = 0.0
    assert not torch.equal(module(*inputs, seed=5), module(*inputs, seed=6))
    torch.testing.assert_close(
        module(*inputs, seed=5),
        fused_emu_loss(
            *inputs, **LOSS | {"beta": 0.0, "seed": 5}, reduction="none", backend=backend
        ),
        rtol=0,
        atol=0,
    )
    assert "mutation_rate=0.5" in repr(module)
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_softmax_loss_is_cross_entropy(reduction: str, backend: str, device: torch.device) -> None:
    inputs = make(6, 9, 21, groups=3, dtype=torch.float64)

    def plain(query: Tensor, table: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        ids = torch.cat([positive[:, None], negative.repeat_interleave(2, 0)], dim=1)
        scores = torch.einsum("bd,bkd->bk", query, table[ids])
        return cross_entropy(scores, torch.zeros(6, dtype=torch.int64), reduction=reduction)

    expected = evaluate(plain, inputs)
    actual = evaluate(fused_softmax_loss, inputs.to(device), reduction=reduction, backend=backend)
    for left, right in zip(
        (*actual.outputs, *actual[1:]), (*expected.outputs, *expected[1:]), strict=True
    ):
        assert_near(left, right)


@pytest.mark.parametrize("padding", [False, True])
def test_loss_is_built_of_the_scores(padding: bool, backend: str, device: torch.device) -> None:
    """fused_emu_loss = uls_cross_entropy(mutated) + α · softmax loss, and so their gradients."""
    inputs = make(6, 9, 21, dtype=torch.float64, padding=padding).to(device)

    def built(*inputs: Tensor) -> Tensor:
        scores = emu_scores(*inputs, mutation_rate=0.5, seed=3, margin=24, backend=backend)
        both = torch.cat([scores.positive[:, None], scores.negative], dim=1)
        vanilla = torch.logsumexp(both, dim=1) - scores.positive
        return uls_cross_entropy(scores.positive, scores.mutated, beta=0.3) + 0.2 * vanilla.mean()

    expected = evaluate(built, inputs)
    actual = evaluate(fused_emu_loss, inputs, backend=backend, **LOSS | {"seed": 3})
    # The margin of 24 costs the expected value a few bits.
    torch.testing.assert_close(actual.outputs, expected.outputs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-11, atol=1e-13)


def test_scores(backend: str, device: torch.device) -> None:
    inputs = make(6, 9, 21, groups=2, dtype=torch.float64, padding=True)
    query, table, positive, negative = inputs
    negative = negative.repeat_interleave(3, 0)
    z_pos, z_neg = table[positive], table[negative]
    drawn = mask.mutation_mask(6, 9, 21, seed=torch.tensor(8), row_offset=40, threshold=128)
    z_mut = torch.where(drawn, z_pos[:, None], z_neg)
    for margin in (0.0, 24, -1.5):
        scores = emu_scores(
            *inputs.to(device),
            mutation_rate=0.5,
            margin=margin,
            seed=8,
            row_offset=40,
            backend=backend,
        )
        assert_near(scores.positive, margin + torch.einsum("bd,bd->b", query, z_pos))
        for actual, z in ((scores.negative, z_neg), (scores.mutated, z_mut)):
            expected = margin + torch.einsum("bd,bkd->bk", query, z)
            assert_near(actual, expected.masked_fill(negative < 0, -math.inf))


def test_mutate(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(s, generator=generator) for s in ((3, 21), (3, 5, 21)))
    upstream = torch.randn(3, 5, 21, generator=generator)
    drawn = mask.mutation_mask(3, 5, 21, seed=torch.tensor(8), row_offset=2, threshold=128)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        pos, neg = (t.to(device, dtype).requires_grad_() for t in (positive, negative))
        out = emu_mutate(pos, neg, mutation_rate=0.5, seed=8, row_offset=2, backend=backend)
        assert out.dtype == dtype
        expected = torch.where(drawn, positive.to(dtype)[:, None], negative.to(dtype))
        assert torch.equal(out.detach().cpu(), expected)
        grads = torch.autograd.grad(out, (pos, neg), upstream.to(out))
        exact = upstream.to(dtype).double()
        assert_near(grads[0], (exact * drawn).sum(1))
        assert torch.equal(grads[1].cpu(), (exact * ~drawn).to(dtype))


class TestUls:
    """``uls_cross_entropy``, which is plain PyTorch and has no backend."""

    @staticmethod
    def scores(batch: int = 5, count: int = 7) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(2)
        positive = torch.randn(batch, generator=generator, dtype=torch.float64)
        negative = torch.randn(batch, count, generator=generator, dtype=torch.float64)
        return positive.requires_grad_(), negative.requires_grad_()

    @pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_is_cross_entropy_with_soft_targets(self, beta: float, reduction: str) -> None:
        positive, negative = self.scores()
        target = torch.full((5, 8), beta, dtype=torch.float64)
        target[:, 0] = 1
        logits = torch.cat([positive[:, None], negative], dim=1)
        expected = cross_entropy(logits, target, reduction=reduction) / 7
        actual = uls_cross_entropy(positive, negative, beta=beta, reduction=reduction)
        torch.testing.assert_close(actual, expected)
        for left, right in zip(
            torch.autograd.grad(actual.sum(), (positive, negative)),
            torch.autograd.grad(expected.sum(), (positive, negative)),
            strict=True,
        ):
            torch.testing.assert_close(left, right)

    def test_derivatives(self) -> None:
        positive, negative = self.scores()
        loss = uls_cross_entropy(positive, negative, beta=0.3, reduction="sum")
        grads = torch.autograd.grad(loss, (positive, negative))
        p = torch.softmax(torch.cat([positive[:, None], negative], dim=1).detach(), dim=1)
        torch.testing.assert_close(grads[0], ((1 + 0.3 * 7) * p[:, 0] - 1) / 7)
        torch.testing.assert_close(grads[1], ((1 + 0.3 * 7) * p[:, 1:] - 0.3) / 7)

    def test_padding(self) -> None:
        positive, negative = self.scores()
        padded = torch.cat([negative, torch.full((5, 2), -math.inf)], dim=1)
        padded[3] = -math.inf
        loss = uls_cross_entropy(positive, padded, beta=0.3, reduction="none")
        expected = uls_cross_entropy(positive, negative, beta=0.3, reduction="none")
        keep = [0, 1, 2, 4]
        torch.testing.assert_close(loss[keep], expected[keep])
        assert loss[3] == 0
        grads = torch.autograd.grad(loss.sum(), (positive, negative))
        assert grads[0][3] == 0
        assert (grads[1][3] == 0).all()
        assert all(g.isfinite().all() for g in grads)

    def test_tensor_beta_and_low_precision(self) -> None:
        positive, negative = (t.detach().bfloat16() for t in self.scores())
        expected = uls_cross_entropy(positive.float(), negative.float(), beta=0.3)
        for shape, dtype in (((), torch.float32), ((1,), torch.float64)):
            beta = torch.full(shape, 0.3, dtype=dtype)
            loss = uls_cross_entropy(positive, negative, beta=beta)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected)

    def test_not_finite(self) -> None:
        for value in (math.nan, math.inf):
            positive, negative = (t.detach() for t in self.scores())
            negative[2, 1] = value
            positive[4] = value
            loss = uls_cross_entropy(positive, negative, beta=0.3, reduction="none")
            assert loss.isnan().tolist() == [False, False, True, False, True]

    def test_empty(self) -> None:
        for shape in ((0, 4), (3, 0), (0, 0)):
            positive = torch.zeros(shape[0], requires_grad=True)
            loss = uls_cross_entropy(positive, torch.zeros(shape), beta=0.3)
            assert loss == 0
            assert (torch.autograd.grad(loss, positive)[0] == 0).all()
