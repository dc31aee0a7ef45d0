"""The mask contract, bit for bit, against a Philox written here with Python integers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from emu_kernels import EMULoss, emu_mutate, emu_scores, fused_emu_loss, fused_softmax_loss, mask
from tests.ops.support import LOSS, Options, make

LOW = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32 with 7 rounds, from the paper's definition (Salmon et al., SC'11)."""
    for _ in range(7):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & LOW,
            (left >> 32) ^ counter[3] ^ key[1],
            left & LOW,
        ]
        key = [(key[0] + 0x9E3779B9) & LOW, (key[1] + 0xBB67AE85) & LOW]
    return counter


def drawn(seed: int, row: int, column: int, dim: int) -> list[int]:
    """The random byte of each component of one negative."""
    out = bytearray()
    for block in range(math.ceil(dim / 16)):
        for word in philox([block, column, row, 0], [seed & LOW, seed >> 32]):
            out += word.to_bytes(4, "little")
    return list(out[:dim])


@dataclass(frozen=True)
class Draw:
    seed: int
    row_offset: int
    dim: int
    threshold: int
    batch: int = 3
    count: int = 4


# Edge cases: both halves of the key, a counter word with its top bit set, a last Philox block that
# is full, partial or the only one, and every special threshold.
DRAWS = [
    Draw(0, 0, 16, 128),
    Draw(1, 0, 1, 128),
    Draw(2**32 - 1, 5, 15, 100),
    Draw(2**32, 2**31 - 2, 17, 37),
    Draw(2**63 - 1, 2**32 - 3, 100, 156),
    Draw(0x0123456789ABCDEF, 2**31 + 11, 129, 128),
    Draw(7, 1, 64, 0),
    Draw(7, 1, 70, 1),
    Draw(7, 1, 70, 255),
    Draw(7, 1, 64, 256),
]


def expected(draw: Draw) -> Tensor:
    rows = [
        [drawn(draw.seed, draw.row_offset + b, k, draw.dim) for k in range(draw.count)]
        for b in range(draw.batch)
    ]
    return torch.tensor(rows) < draw.threshold


def by_mutate(draw: Draw, backend: str, device: torch.device) -> Tensor:
    out = emu_mutate(
        torch.ones(draw.batch, draw.dim, device=device),
        torch.zeros(draw.batch, draw.count, draw.dim, device=device),
        mutation_rate=draw.threshold / 256,
        seed=draw.seed,
        row_offset=draw.row_offset,
        backend=backend,
    )
    assert ((out == 0) | (out == 1)).all()
    return out == 1


def by_mutate_gradient(draw: Draw, backend: str, device: torch.device) -> Tensor:
    positive = torch.zeros(draw.batch, draw.dim, device=device)
    negative = torch.zeros(draw.batch, draw.count, draw.dim, device=device).requires_grad_()
    out = emu_mutate(
        positive,
        negative,
        mutation_rate=draw.threshold / 256,
        seed=draw.seed,
        row_offset=draw.row_offset,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(out.sum(), negative)
    assert ((grad == 0) | (grad == 1)).all()
    return grad == 0


def ones_against_zeros(draw: Draw, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Table, positive and negative such that a mutated negative equals its mask."""
    table = torch.tensor([[0.0], [1.0]], device=device).repeat(1, draw.dim)
    positive = torch.ones(draw.batch, dtype=torch.int64, device=device)
    return table, positive, torch.zeros(draw.batch, draw.count, dtype=torch.int64, device=device)


def by_scores(draw: Draw, backend: str, device: torch.device) -> Tensor:
    """Twenty components per call: with a query of powers of two, the score's bits are the mask."""
    table, positive, negative = ones_against_zeros(draw, device)
    out = torch.zeros(draw.batch, draw.count, draw.dim, dtype=torch.bool)
    for start in range(0, draw.dim, 20):
        width = min(20, draw.dim - start)
        query = torch.zeros(draw.batch, draw.dim, device=device)
        query[:, start : start + width] = 2.0 ** torch.arange(width, device=device)
        scores = emu_scores(
            query,
            table,
            positive,
            negative,
            mutation_rate=draw.threshold / 256,
            seed=draw.seed,
            row_offset=draw.row_offset,
            backend=backend,
        )
        number = scores.mutated.cpu().long()[..., None]
        out[..., start : start + width] = (number >> torch.arange(width)) & 1 == 1
    return out


def by_query_gradient(draw: Draw, backend: str, device: torch.device) -> Tensor:
    """The gradient of one mutated score is the mutated negative."""
    table, positive, negative = ones_against_zeros(draw, device)
    query = torch.zeros(draw.batch, draw.dim, device=device).requires_grad_()
    scores = emu_scores(
        query,
        table,
        positive,
        negative,
        mutation_rate=draw.threshold / 256,
        seed=draw.seed,
        row_offset=draw.row_offset,
        backend=backend,
    )
    columns = [
        torch.autograd.grad(scores.mutated[:, k].sum(), query, retain_graph=True)[0]
        for k in range(draw.count)
    ]
    return torch.stack(columns, dim=1) == 1


def by_table_gradient(draw: Draw, backend: str, device: torch.device) -> Tensor:
    """Each negative of each row is a separate row of the table, whose gradient is 1 − mask."""
    rows = 1 + draw.batch * draw.count
    table = torch.zeros(rows, draw.dim, device=device).requires_grad_()
    negative = torch.arange(1, rows, device=device).reshape(draw.batch, draw.count)
    scores = emu_scores(
        torch.ones(draw.batch, draw.dim, device=device),
        table,
        torch.zeros(draw.batch, dtype=torch.int64, device=device),
        negative,
        mutation_rate=draw.threshold / 256,
        seed=draw.seed,
        row_offset=draw.row_offset,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(scores.mutated.sum(), table)
    out = grad[1:].reshape(draw.batch, draw.count, draw.dim)
    assert torch.equal(grad[0], (1 - out).sum((0, 1)))
    return out == 0


def by_loss_gradient(draw: Draw, backend: str, device: torch.device) -> Tensor:
    """With a query of 0, one negative and β = 0, unmutated components have the gradient −½."""
    table, positive, negative = ones_against_zeros(draw, device)
    columns = []
    for k in range(draw.count):
        query = torch.zeros(draw.batch, draw.dim, device=device).requires_grad_()
        alone = torch.full_like(negative, -1)
        alone[:, k] = negative[:, k]
        loss = fused_emu_loss(
            query,
            table,
            positive,
            alone,
            mutation_rate=draw.threshold / 256,
            beta=0.0,
            alpha=0.0,
            seed=draw.seed,
            row_offset=draw.row_offset,
            reduction="sum",
            backend=backend,
        )
        columns.append(torch.autograd.grad(loss, query)[0] > -0.25)
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(
    "reveal",
    [
        by_mutate,
        by_mutate_gradient,
        by_scores,
        by_query_gradient,
        by_table_gradient,
        by_loss_gradient,
    ],
)
@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_bits(
    draw: Draw,
    reveal: Callable[[Draw, str, torch.device], Tensor],
    backend: str,
    device: torch.device,
) -> None:
    assert torch.equal(reveal(draw, backend, device).cpu(), expected(draw))


def test_columns_past_16_bits(backend: str, device: torch.device) -> None:
    draw = Draw(3, 0, 2, 128, batch=1, count=2**16 + 40)
    tail = by_mutate(draw, backend, device).cpu()[:, 2**16 :]
    rows = [drawn(draw.seed, 0, k, draw.dim) for k in range(2**16, draw.count)]
    assert torch.equal(tail[0], torch.tensor(rows) < draw.threshold)


def words(counter: list[int], key: list[int]) -> str:
    tensors = [torch.tensor(c) for c in counter]
    keys = torch.tensor(key[0]), torch.tensor(key[1])
    out = mask.philox4x32((tensors[0], tensors[1], tensors[2], tensors[3]), keys)
    return " ".join(f"{w:08x}" for w in out.tolist())


def test_known_answers() -> None:
    assert words([0] * 4, [0] * 2) == "5f6fb709 0d893f64 4f121f81 4f730a48"
    assert words([LOW] * 4, [LOW] * 2) == "5207ddc2 45165e59 4d8ee751 8c52f662"
    for counter, key in (([0] * 4, [0] * 2), ([LOW] * 4, [LOW] * 2), ([1, 2, 3, 4], [5, 6])):
        assert words(counter, key) == " ".join(f"{w:08x}" for w in philox(counter, key))


@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_mutation_mask(draw: Draw) -> None:
    drawn_mask = mask.mutation_mask(
        draw.batch,
        draw.count,
        draw.dim,
        seed=torch.tensor(draw.seed),
        row_offset=draw.row_offset,
        threshold=draw.threshold,
    )
    assert torch.equal(drawn_mask, expected(draw))


GOLDEN = {1: "2c86696e88434af0b62f2b3672e43ef65aca3681c3f21c836186c5927aa7c9f8"}


def test_contract_version(backend: str, device: torch.device) -> None:
    """A change of the masks needs a new version: recorded runs could not be repeated."""
    bits = by_mutate(Draw(0xFEDCBA987654321, 12345, 100, 156, 16, 16), backend, device)
    digest = hashlib.sha256(bits.cpu().to(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest == GOLDEN[mask.CONTRACT_VERSION]


def test_threshold_is_rounded_half_to_even(backend: str, device: torch.device) -> None:
    for rate, threshold in ((0.5, 0), (1.5, 2), (2.5, 2), (2.51, 3), (255.5, 256), (255.4, 255)):
        assert mask.rate_to_threshold(rate / 256) == threshold
        assert mask.effective_rate(rate / 256) == threshold / 256
        draw = Draw(9, 0, 100, threshold)
        out = emu_mutate(
            torch.ones(draw.batch, draw.dim, device=device),
            torch.zeros(draw.batch, draw.count, draw.dim, device=device),
            mutation_rate=rate / 256,
            seed=draw.seed,
            backend=backend,
        )
        assert torch.equal(out.cpu() == 1, expected(draw))


def test_sharding_changes_no_mask(backend: str, device: torch.device) -> None:
    whole = Draw(11, 1000, 50, 128, batch=6)
    for reveal in (by_mutate, by_scores, by_table_gradient):
        parts = [
            reveal(replace(whole, row_offset=1000 + at, batch=size), backend, device)
            for at, size in ((0, 1), (1, 3), (4, 2))
        ]
        assert torch.equal(torch.cat(parts), reveal(whole, backend, device))


def test_sharding_changes_no_loss(backend: str, device: torch.device) -> None:
    inputs = make(6, 5, 50, device=device)
    options = LOSS | {"reduction": "none", "backend": backend}
    whole = fused_emu_loss(*inputs, **options)
    parts = [
        fused_emu_loss(
            inputs.query[at : at + 2],
            inputs.table,
            inputs.positive[at : at + 2],
            inputs.negative[at : at + 2],
            row_offset=at,
            **options,
        )
        for at in (0, 2, 4)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_shared_negatives_are_mutated_apart(backend: str, device: torch.device) -> None:
    """Rows that share a set of negatives have different masks."""
    draw = Draw(11, 3, 50, 128, batch=4)
    table, positive, negative = ones_against_zeros(draw, device)
    query = torch.zeros(draw.batch, draw.dim, device=device).requires_grad_()
    scores = emu_scores(
        query,
        table,
        positive,
        negative[:1],
        mutation_rate=0.5,
        seed=11,
        row_offset=3,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(scores.mutated[:, 2].sum(), query)
    assert torch.equal(grad.cpu() == 1, expected(draw)[:, 2])


@pytest.mark.parametrize("threshold", [3, 128, 240])
def test_statistics(threshold: int) -> None:
    """Each component, column and row has the given rate; neighbours are independent. To 5 sigma."""
    drawn_mask = mask.mutation_mask(
        64, 64, 64, seed=torch.tensor(5), row_offset=0, threshold=threshold
    ).double()
    p = threshold / 256
    for kept in range(3):
        others = [d for d in range(3) if d != kept]
        sigma = (p * (1 - p) / 64**2) ** 0.5
        assert ((drawn_mask.mean(others) - p).abs() < 5 * sigma).all()
        # Neighbours along this dimension: products of centred values have mean 0.
        ahead, behind = (drawn_mask.narrow(kept, start, 63) - p for start in (1, 0))
        assert abs((ahead * behind).mean()) < 5 * p * (1 - p) / (63 * 64**2) ** 0.5


def test_seed_as_int_and_as_tensor(backend: str, device: torch.device) -> None:
    inputs = make(device=device)
    options: Options = {"mutation_rate": 0.5, "beta": 0.3, "alpha": 0.2, "backend": backend}
    seed = 2**40 + 3
    loss = fused_emu_loss(*inputs, seed=seed, **options)
    for shape in ((), (1,)):
        tensor = torch.full(shape, seed, dtype=torch.int64, device=device)
        assert torch.equal(fused_emu_loss(*inputs, seed=tensor, **options), loss)
    assert not torch.equal(fused_emu_loss(*inputs, seed=seed + 2**32, **options), loss)


def test_no_seed_draws_from_torch(backend: str, device: torch.device) -> None:
    inputs = make(device=device)
    options: Options = {"mutation_rate": 0.5, "beta": 0.3, "alpha": 0.2, "backend": backend}
    module = EMULoss(mutation_rate=0.5, beta=0.3, alpha=0.2, backend=backend)

    def losses() -> list[float]:
        torch.manual_seed(4)
        calls = [lambda: fused_emu_loss(*inputs, **options), lambda: module(*inputs)]
        return [call().item() for call in calls for _ in range(3)]

    first = losses()
    assert len(set(first)) == len(first)
    assert losses() == first


def test_generator_is_left_alone_where_nothing_is_drawn(backend: str, device: torch.device) -> None:
    inputs = make(device=device)

    def state() -> Tensor:
        return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)

    before = state()
    fused_emu_loss(*inputs, **LOSS, backend=backend)
    fused_softmax_loss(*inputs, backend=backend)
    assert torch.equal(state(), before)
