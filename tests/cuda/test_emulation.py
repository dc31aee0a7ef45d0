"""The emulated CUDA kernels: any order of a block's threads, huge tables, bad arguments.

tests/ops compares their results with the specification, through the same emulation.
"""

from __future__ import annotations

import math
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import (
    Expected,
    Mixup,
    backends,
    emu_mutate,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
    prepare,
    values,
)
from emu_kernels.backends import cuda as cuda_module
from emu_kernels.backends import ids
from emu_kernels.backends.cuda import CudaBackend
from emu_kernels.mutation import NoMutation
from emu_kernels.similarity import SIMILARITIES
from tests.cuda import emulation
from tests.ops.support import (
    LOSS,
    Inputs,
    Options,
    Result,
    assert_agree,
    evaluate,
    exact,
    make,
    same_bits,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the cuda backend is the real one"
)
CPU = torch.device("cpu")
MAP_NORESERVE = 0x4000  # Linux's value; Python 3.10's module mmap lacks it
ORDERS = [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)]


@pytest.fixture
def cuda() -> Iterator[emulation.EmulatedCudaBackend]:
    backend = emulation.install()
    ids.report(CPU).zero_()
    yield backend
    backend.set_order("forward")
    ids.report(CPU).zero_()


def test_it_is_no_default(cuda: emulation.EmulatedCudaBackend) -> None:
    assert backends.default_backend("cpu") == "cpu"


class Asking(emulation.EmulatedCudaBackend):
    """Asks torch and the driver (a pybind function) whether it can run, as on a GPU machine."""

    def unavailable(self) -> str | None:
        return CudaBackend.unavailable(self)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_compile_does_not_trace_questions_to_the_driver(
    device: str, cuda: emulation.EmulatedCudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither if the backend is named, on CPU tensors, nor if it is the default, on GPU tensors."""
    asking = Asking(cuda._native)
    asking.device_types = (device,)
    gpu = SimpleNamespace(
        is_available=lambda: True,
        get_device_capability=lambda: (9, 0),
        is_built=lambda: True,
    )
    # Not by patching torch's own functions: torch.compile would believe in a GPU as well.
    patched = SimpleNamespace(**vars(torch) | {"cuda": gpu, "backends": SimpleNamespace(cuda=gpu)})
    monkeypatch.setattr(cuda_module, "torch", patched)
    monkeypatch.setitem(backends._BY_NAME, "cuda", asking)
    cuda_module._device_problem.cache_clear()

    def call(x: Tensor) -> Tensor:
        if device == "cuda":
            return x + len(backends.default_backend("cuda"))
        return emu_mutate(x, x[:, None], mutation_rate=0.5, seed=1, backend="cuda")

    x = torch.randn(3, 20)
    torch.compiler.reset()
    try:
        fused = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(fused(x), call(x))
        if device == "cuda":
            assert torch.equal(call(x), x + 4)
    finally:
        torch.compiler.reset()
        cuda_module._device_problem.cache_clear()


def options_of(similarity: str, batch: int, dim: int) -> Options:
    generator = torch.Generator().manual_seed(3)
    takes = SIMILARITIES[similarity]
    options: Options = {"similarity": similarity}
    if takes.scaled_halves:
        options["scale"] = torch.rand(batch, dim // takes.halves, generator=generator) + 0.5
    if takes.weights:
        options["similarity_weights"] = torch.rand(takes.weights, generator=generator) + 0.5
    return options


def all_of(inputs: Inputs, options: Options) -> list[Result]:
    """All results of the kernels' instance for one similarity, mutation and dtype."""

    def scored(*tensors: Tensor, **more: Any) -> tuple[Tensor, ...]:
        return tuple(s.nan_to_num(neginf=0) for s in emu_scores(*tensors, **more))

    mutation = options.pop("mutation_rate")
    calls: list[tuple[Any, Options]] = [
        (fused_emu_loss, LOSS | {"mutation_rate": mutation}),
        (fused_emu_loss, LOSS | {"mutation_rate": mutation, "sparse_grad": True}),
        (scored, {"mutation_rate": mutation, "seed": 5}),
    ]
    return [evaluate(function, inputs, backend="cuda", **own, **options) for function, own in calls]


# Rows of at most one warp, of several warps, and of several tiles.
@pytest.mark.parametrize("dim", [100, 300, 1300])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_same_bits_in_any_order(
    similarity: str, dim: int, cuda: emulation.EmulatedCudaBackend
) -> None:
    """The batch has few entities, so several blocks contribute to each."""
    dtype = torch.bfloat16 if dim == 300 else torch.float32
    inputs = make(4, 18, dim, rows=3, groups=2, dtype=dtype, padding=True)
    for mutation in (0.5, Mixup()):
        results = []
        for order, seed in ORDERS:
            cuda.set_order(order, seed)
            options = options_of(similarity, 4, dim) | {"mutation_rate": mutation}
            results.append(all_of(inputs, options))
        for other in results[1:]:
            pairs = zip(results[0], other, strict=True)
            assert all(same_bits(left, right) for left, right in pairs)


def expected_options(similarity: str, batch: int, dim: int) -> tuple[Options, Tensor]:
    """The options except the rule, and rates for each row."""
    coupled = SIMILARITIES[similarity].coupled
    generator = torch.Generator().manual_seed(4)
    rates = torch.rand(batch, dim // 2 if coupled else dim, generator=generator)
    options = options_of(similarity, batch, dim)
    return options | ({"mask_unit": "pair"} if coupled else {}), rates.requires_grad_()


@pytest.mark.parametrize("dim", [100, 1300])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_moments_in_any_order(
    similarity: str, dim: int, cuda: emulation.EmulatedCudaBackend
) -> None:
    """Also with learned rates, which take passes of their own."""
    inputs = make(4, 18, dim, rows=3, groups=2, padding=True)
    options, rates = expected_options(similarity, 4, dim)
    learned = options | LOSS | {"mutation_rate": Expected(rates), "backend": "cuda"}
    results, gradients = [], []
    for order, seed in ORDERS:
        cuda.set_order(order, seed)
        results.append(all_of(inputs, options | {"mutation_rate": Expected(0.4)}))
        gradients.append(torch.autograd.grad(fused_emu_loss(*inputs, **learned), rates)[0])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_moments_in_one_pass(similarity: str, cuda: emulation.EmulatedCudaBackend) -> None:
    """Rates that are not learned may take one pass over the negatives, and learned ones take two:
    the results are the same."""
    inputs = make(6, 21, 136, groups=3, padding=True)
    options, rates = expected_options(similarity, 6, 136)
    for rate in (rates, rates.detach()):
        all_options = options | LOSS | {"mutation_rate": Expected(rate)}
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in all_options.items()}
        wide["mutation_rate"] = Expected(rates.detach().double())
        actual = evaluate(fused_emu_loss, inputs, backend="cuda", **all_options)
        assert_agree(actual, exact(fused_emu_loss, inputs, **wide))


def test_a_rate_out_of_range_gives_nan(
    cuda: emulation.EmulatedCudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a rate arrives as NaN if values cannot be read without waiting for the device."""
    monkeypatch.setattr(values, "usable_rates", lambda _name, rate: rate)
    rates = torch.full((6, 20), 0.5)
    rates[2, 7] = math.nan
    for learned in (False, True):
        options = LOSS | {"mutation_rate": Expected(rates.requires_grad_(learned))}
        loss = fused_emu_loss(*make(6, 5, 20), reduction="none", backend="cuda", **options)
        assert loss.isnan().nonzero().flatten().tolist() == [2]


def test_mutate_in_any_order(cuda: emulation.EmulatedCudaBackend) -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(3, 40), torch.randn(3, 5, 40, generator=generator)
    upstream = torch.randn(3, 5, 40, generator=generator)
    results = []
    for order, seed in ORDERS:
        cuda.set_order(order, seed)
        pos, neg = positive.clone().requires_grad_(), negative.clone().requires_grad_()
        out = emu_mutate(pos, neg, mutation_rate=0.5, seed=1, backend="cuda")
        results.append((out.detach(), *torch.autograd.grad(out, (pos, neg), upstream)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def scores_program(tmp_path: Path) -> Any:
    """Compiles scores.cpp with a copy of the sources in which some text is replaced; runs it."""

    def build(change: tuple[str, str] | None) -> set[str]:
        source = tmp_path / ("changed" if change else "same")
        shutil.copytree(emulation.ROOT / "csrc", source)
        if change is not None:
            path = source / "cuda/query_major.cuh"
            text = path.read_text()
            assert text.count(change[0]) == 1
            path.write_text(text.replace(*change))
        program = source / "scores"
        subprocess.run(
            [
                "g++", "-x", "c++", "-std=c++20", "-O1", "-ffp-contract=off",
                f"-I{source}", f"-I{emulation.ROOT / 'tests/cuda'}",
                str(emulation.ROOT / "tests/cuda/scores.cpp"), "-o", str(program),
            ],
            check=True,
        )  # fmt: skip
        runs = [
            subprocess.run([program, order, str(seed)], check=True, text=True, capture_output=True)
            for order, seed in ORDERS
        ]
        return {run.stdout for run in runs}

    return build


DRAWN = """          team.sync();
          if constexpr (masked(kMode)) {"""


def test_a_missing_barrier_shows(scores_program: Any) -> None:
    """Removing the barrier between drawing masks and using them changes the results."""
    (expected,) = scores_program(None)
    changed = scores_program((DRAWN, DRAWN.replace("team.sync();", "")))
    assert changed != {expected}


def test_large_table(cuda: emulation.EmulatedCudaBackend) -> None:
    """More than 2**32 elements and 16 GiB; only the pages of the used rows take memory."""
    dim = 8
    rows = 2**29 + 7
    memory = mmap.mmap(
        -1, rows * dim * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    )
    table = torch.frombuffer(memory, dtype=torch.float32).view(rows, dim)
    inputs = make(6, 5, dim, rows=9, padding=True)
    # The entities keep their order, and so do their gradients.
    moved = torch.tensor(
        [0, 2**26, 2**27 + 1, 2**28 - 1, 2**28, 2**29 - 1, 2**29, 2**29 + 5, rows - 1]
    )
    table[moved] = inputs.table
    large = inputs._replace(
        table=table,
        positive=moved[inputs.positive],
        negative=torch.where(inputs.negative < 0, -1, moved[inputs.negative.clamp(min=0)]),
    )
    expected = exact(fused_emu_loss, inputs, **LOSS)
    query, wide = large.query.clone().requires_grad_(), table.requires_grad_()
    loss = fused_emu_loss(
        query, wide, large.positive, large.negative, sparse_grad=True, backend="cuda", **LOSS
    )
    loss.backward()
    assert wide.grad is not None
    assert query.grad is not None
    grad = torch.zeros(9, dim)
    sparse = wide.grad.coalesce()
    grad[torch.searchsorted(moved, sparse.indices()[0])] = sparse.values()
    assert_agree(Result((loss.detach(),), query.grad, grad), expected)


@pytest.mark.parametrize("rule", [0.5, Expected(0.4)], ids=["masks", "moments"])
def test_ids_out_of_range_are_reported(
    rule: float | Expected, cuda: emulation.EmulatedCudaBackend
) -> None:
    """Their rows' losses are NaN, other rows' losses are right, and the next call raises."""
    inputs = make(6, 5, 20)
    options = LOSS | {"mutation_rate": rule, "backend": "cuda"}
    expected = fused_emu_loss(*inputs, reduction="none", **options)
    for name, row, value in (("negative", 2, 9), ("negative", 3, -2), ("positive", 4, 10**12)):
        bad = inputs._replace(**{name: getattr(inputs, name).clone()})
        getattr(bad, name)[row] = value
        query, table = bad.query.clone().requires_grad_(), bad.table.clone().requires_grad_()
        loss = fused_emu_loss(query, table, *bad[2:], reduction="none", **options)
        others = [b for b in range(6) if b != row]
        assert loss[row].isnan()
        assert torch.equal(loss[others], expected[others])
        loss[others].sum().backward()
        with pytest.raises(IndexError, match=f"{name}.*earlier call.*got {value}"):
            fused_emu_loss(*inputs, **options)
        ids.report(CPU).zero_()
        assert torch.equal(fused_emu_loss(*inputs, reduction="none", **options), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
@pytest.mark.parametrize("name", ["beta", "alpha"])
def test_bad_coefficient_gives_nan(
    name: str, bad: float, cuda: emulation.EmulatedCudaBackend
) -> None:
    inputs, good = make(), torch.tensor(0.25)
    options = LOSS | {"beta": good, "alpha": good, "backend": "cuda", "reduction": "none"}
    assert fused_emu_loss(*inputs, **options).isfinite().all()
    assert fused_emu_loss(*inputs, **options | {name: torch.tensor(bad)}).isnan().all()


@pytest.mark.parametrize("rule", ["masks", "none", "moments"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_atomic_gradient(
    similarity: str,
    rule: str,
    cuda: emulation.EmulatedCudaBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table's gradient by atomic adds instead of sorted segments; whole and partial vectors."""
    monkeypatch.setattr(cuda, "atomic_gradient", True)
    monkeypatch.setattr(cuda._native, "table_gradient", None)  # would fail if called
    function, rates = (fused_softmax_loss, {}) if rule == "none" else (fused_emu_loss, LOSS)
    for dim in (38, 136):
        inputs = make(6, 9, dim, groups=3, padding=True)
        options = rates | options_of(similarity, 6, dim)
        if rule == "moments":
            options |= {"mutation_rate": Expected(0.4)} | expected_options(similarity, 6, dim)[0]
        actual = evaluate(function, inputs, backend="cuda", **options)
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        assert_agree(actual, exact(function, inputs, **wide))


def test_atomics_are_not_for_deterministic_algorithms(
    cuda: emulation.EmulatedCudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(fused_emu_loss, make(), backend="cuda", **LOSS)
    monkeypatch.setattr(cuda, "atomic_gradient", True)
    monkeypatch.setattr(cuda._native, "table_gradient_atomic", None)  # would fail if called
    torch.use_deterministic_algorithms(True)
    try:
        assert same_bits(evaluate(fused_emu_loss, make(), backend="cuda", **LOSS), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("batch", [1, 40, 300])
@pytest.mark.parametrize("rows", [3, 20_000])
def test_runs_are_numbered(batch: int, rows: int, cuda: emulation.EmulatedCudaBackend) -> None:
    """The touched row that each run of 32 entries begins in, of as many runs as there can be."""
    inputs = make(batch, 900, 2, rows=rows, padding=True)
    request = prepare.scores(
        *inputs,
        similarity="dot",
        mutation=NoMutation(),
        mask_unit="component",
        scale=None,
        similarity_weights=None,
        phase_scale=1.0,
        seed=None,
        row_offset=0,
        sparse_grad=True,
    )
    problem = cuda._problem(request)
    ids = torch.cat([inputs.negative.flatten(), inputs.positive])
    touched, ordinals = ids[ids >= 0].sort().values.unique(return_inverse=True)
    for order, seed in ORDERS[:3]:
        cuda.set_order(order, seed)
        ordered, partials = cuda._sorted(request, problem)
        assert ordered is not None
        assert partials is not None
        at = cuda._native.count_touched(
            problem=problem, sorted=ordered.data_ptr(), partials=partials.data_ptr()
        )
        numbered = partials[: at + 8].view(torch.int64)
        assert numbered[-1] == len(touched)
        expected = ordinals[::32]
        assert torch.equal(numbered[: len(expected)], expected)
