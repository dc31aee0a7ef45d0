"""The Triton backend's plans and tiles, and the reports of bad ids by its kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emu_kernels import Expected, backends, emu_scores, fused_emu_loss
from emu_kernels.backends import ids
from emu_kernels.backends import triton as backend
from emu_kernels.mutation import Component
from emu_kernels.request import LossRequest
from tests.ops.support import LOSS, Inputs, Options, assert_agree, evaluate, exact, make, same_bits

if backends.get("triton").unavailable() is not None:
    pytest.skip("triton cannot run here", allow_module_level=True)

from emu_kernels.triton import launch

DEVICE = torch.device(backends.get("triton").device_types[0])
GPU_TILES = {
    # The interpreter would use one tile for these shapes. As on a GPU, these leave partial tiles in
    # each direction, and give several spans, and segments that cross pieces.
    "one row after another": launch.Tile(1, 16, 1),
    "few of few": launch.Tile(4, 32, 1),
}


@pytest.fixture(params=GPU_TILES)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = GPU_TILES[request.param]
    monkeypatch.setattr(launch, "tile", lambda width, count: chosen)
    monkeypatch.setattr(launch, "backward_tile", lambda p: (4, chosen))
    monkeypatch.setattr(launch, "block", lambda count: 16)
    monkeypatch.setattr(launch, "_splits", lambda p, programs: 2)


@pytest.fixture(autouse=True)
def _no_reports() -> Iterator[None]:
    ids.report(DEVICE).zero_()
    yield
    ids.report(DEVICE).zero_()


@pytest.mark.parametrize("mutation", ["mask", "none"])
@pytest.mark.parametrize("dim", [13, 50])
@pytest.mark.usefixtures("small_tiles")
def test_any_tile(dim: int, mutation: str) -> None:
    """Rows in one or several chunks; few or many negatives in a tile."""
    inputs = make(3, 11, dim, rows=4, padding=True)
    options = LOSS if mutation == "mask" else LOSS | {"mutation_rate": 0.0}
    expected = exact(fused_emu_loss, inputs, **options)
    assert_agree(evaluate(fused_emu_loss, inputs.to(DEVICE), backend="triton", **options), expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("units", [1, 37])
def test_expected_rates_in_any_tile(units: int) -> None:
    """One rate for all, and rates for each row, with their gradients."""
    inputs = make(3, 11, 37, rows=4, padding=True)
    given = torch.rand(3, units, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = given[0, 0] if units == 1 else given
    found = []
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (*inputs[:2], given)]
        query, table, rate = leaves
        options = LOSS | {"mutation_rate": Expected(rate), "backend": name}
        ids_ = [x.to(DEVICE) for x in inputs[2:]]
        loss = fused_emu_loss(query, table, *ids_, **options)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [[[float("nan")]], [[0.5] * 19 + [float("nan")]]])
@pytest.mark.parametrize("similarity", ["dot", "hake"])
def test_a_bad_rate_on_the_device_gives_nan(similarity: str, bad: list[list[float]]) -> None:
    inputs = make(2, 3, 20, device=DEVICE)
    rule = Expected(torch.tensor(bad, device=DEVICE), learned=True)
    request = LossRequest(
        **inputs._asdict(), scale=None, weights=None, similarity=similarity, phase_scale=1.0,
        mutation=rule, seed=torch.tensor(1, device=DEVICE), row_offset=0, sparse_grad=False,
        beta=0.1, alpha=0.1, sample_weight=None, reduction="mean", coefficients=None,
    )  # fmt: skip
    assert launch.loss_forward(request, need_grad=True).loss.isnan()
    assert launch.loss_forward(request, need_grad=False).loss.isnan()


@pytest.mark.parametrize("table_gradients", ["sorted", "atomic"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_plans_agree(
    similarity: str, passes: int, table_gradients: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(4, 9, 37, rows=6, padding=True)
    monkeypatch.setattr(launch, "passes", passes)
    monkeypatch.setattr(backend, "table_gradients", table_gradients)
    options = LOSS | {"similarity": similarity}
    expected = exact(fused_emu_loss, inputs, **options)
    assert_agree(evaluate(fused_emu_loss, inputs.to(DEVICE), backend="triton", **options), expected)


def test_atomic_additions_give_way_where_torch_wants_determinism(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make(4, 9, 37, rows=6, device=DEVICE)
    expected = evaluate(fused_emu_loss, inputs, backend="triton", **LOSS)
    monkeypatch.setattr(backend, "table_gradients", "atomic")
    monkeypatch.setattr(launch.backward, "scatter", None)  # cannot be launched
    torch.use_deterministic_algorithms(True)
    try:
        actual = evaluate(fused_emu_loss, inputs, backend="triton", **LOSS)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(actual, expected)


@pytest.mark.parametrize("half", [1, 5, 10, 15, 18, 23, 28])
def test_masks_of_a_half_that_begins_inside_a_philox_block(half: int) -> None:
    """The second half begins at every byte of a word and at every word of a block."""
    inputs = make(2, 3, 2 * half, rows=5)
    options: Options = {"similarity": "rotate", "mutation_rate": 0.5, "seed": 2**40 + 3}
    expected = emu_scores(*inputs, backend="reference", **options)
    actual = emu_scores(*inputs.to(DEVICE), backend="triton", **options)
    torch.testing.assert_close(actual.mutated.cpu(), expected.mutated)


def spoiled(name: str, value: int) -> Inputs:
    inputs = make(4, 5, 20, rows=9, padding=False)
    bad = getattr(inputs, name).clone()
    bad.view(-1)[-1] = value
    return inputs._replace(**{name: bad}).to(DEVICE)


@pytest.mark.parametrize(
    ("name", "value", "similarity"),
    [
        ("positive", 9, "dot"),
        ("positive", -1, "hake"),
        ("negative", 9, "hake"),
        ("negative", -2, "dot"),
        ("negative", 2**40, "dot"),
    ],
)
def test_a_bad_id_makes_its_row_nan_and_is_raised_later(
    name: str, value: int, similarity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rows keep their values; nothing outside the table is read or written."""
    monkeypatch.delenv("EMU_KERNELS_CHECK", raising=False)
    options = LOSS | {"backend": "triton", "similarity": similarity, "reduction": "none"}
    good = evaluate(fused_emu_loss, make(4, 5, 20, rows=9, device=DEVICE), **options)
    actual = evaluate(fused_emu_loss, spoiled(name, value), **options)
    assert actual.outputs[0].isnan().tolist() == [False] * 3 + [True]
    torch.testing.assert_close(actual.outputs[0][:3], good.outputs[0][:3])
    torch.testing.assert_close(actual.query[:3], good.query[:3])
    assert actual.query[3].isnan().all()
    with pytest.raises(IndexError, match=f"{name}: an earlier call.*got {value}"):
        fused_emu_loss(*make(device=DEVICE), **options)
    assert fused_emu_loss(*make(device=DEVICE), **options).isfinite().all()


def test_scores_of_a_bad_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMU_KERNELS_CHECK", raising=False)
    out = emu_scores(*spoiled("positive", 99), mutation_rate=0.5, seed=1, backend="triton")
    for scores in out:
        bad = scores.isnan() if scores.ndim == 1 else scores.isnan().all(dim=1)
        assert bad.tolist() == [False] * 3 + [True]


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
def test_a_bad_coefficient_on_the_device_gives_nan(bad: float) -> None:
    inputs = make(2, 3, 20, device=DEVICE)
    for pair in ([bad, 0.5], [0.5, bad]):
        request = LossRequest(
            **inputs._asdict(), scale=None, weights=None, similarity="dot", phase_scale=1.0,
            mutation=Component(threshold=128), seed=torch.tensor(1, device=DEVICE), row_offset=0,
            sparse_grad=False, beta=0.0, alpha=0.0, sample_weight=None, reduction="mean",
            coefficients=torch.tensor(pair, device=DEVICE),
        )  # fmt: skip
        state = launch.loss_forward(request, need_grad=True)
        assert state.loss.isnan()
        assert state.grad_query.isnan().all()
