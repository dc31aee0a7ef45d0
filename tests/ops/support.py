"""Shared by the operators' tests: inputs, the exact result, comparisons to a tolerance."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from emu_kernels import Expected, backends

ROOT = Path(__file__).resolve().parents[2]

Options = dict[str, Any]

LOSS: Options = {"mutation_rate": 0.5, "beta": 0.3, "alpha": 0.2, "seed": 20250327}
"""Options of ``fused_emu_loss`` with which no term vanishes."""

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
"""Tolerance of sums, relative to a tensor's largest value: about 80 and 450 machine epsilons. It is
enough for 1000-term dot products and for thousands of contributions that cancel. In the tested
shapes, one wrong mask bit or weight causes an error of at least 1e-3."""

HALF_WIDTH = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""Relative size of one unit in the last place. A sum within the tolerance above is rounded once, to
the right low-precision number or a neighbour of it."""


class Limits(NamedTuple):
    rows: int  # B
    columns: int  # K
    components: int  # B·K·D


EMULATED = {
    # Triton's interpreter needs about 10 ms for each row, tile of candidates, and entity.
    "triton": Limits(12, 1000, 170_000),
    "cuda": Limits(300, 100_000, 300_000),
}
"""The largest shapes that are tested where GPU kernels are emulated on the CPU."""


def device_of(backend: str) -> torch.device:
    """The device that a backend's tensors are on; the CPU for the specification."""
    types = ("cpu",) if backend == backends.REFERENCE else backends.get(backend).device_types
    return torch.device(types[0])


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or the tensors in a rule, on the device; anything else unchanged."""
    if isinstance(value, Expected):
        return Expected(to_device(value.rate, device))
    return value.to(device) if isinstance(value, Tensor) else value


def emulated(backend: str, device: torch.device) -> bool:
    """Whether the backend's GPU kernels are emulated on the CPU."""
    return backend not in ("reference", "cpu") and device.type == "cpu"


def affordable(backend: str, device: torch.device, *, batch: int, count: int, dim: int) -> bool:
    """Whether a shape is small enough to be tested; if the kernels are not emulated, any is."""
    if not emulated(backend, device):
        return True
    limits = EMULATED[backend]
    size = (batch, count, batch * max(count, 1) * dim)
    return all(value <= limit for value, limit in zip(size, limits, strict=True))


def skip_if_too_slow(
    backend: str, device: torch.device, *, batch: int, count: int, dim: int
) -> None:
    """Skip a test whose shape is not :func:`affordable`."""
    if not affordable(backend, device, batch=batch, count=count, dim=dim):
        pytest.skip(f"{backend} is emulated on the CPU, where this shape takes too long")


class Inputs(NamedTuple):
    query: Tensor  # (B, D)
    table: Tensor  # (N, D)
    positive: Tensor  # (B,)
    negative: Tensor  # (G, K)

    def wide(self) -> Inputs:
        """The same numbers in fp64."""
        return self._replace(query=self.query.double(), table=self.table.double())

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(t.to(device) for t in self))


def make(
    batch: int = 6,
    count: int = 5,
    dim: int = 20,
    *,
    rows: int = 9,
    groups: int | None = None,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    ids: torch.dtype = torch.int64,
    padding: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Random inputs with scores of order 1; the first positive is among the first set's negatives.

    With ``padding`` about a quarter of the negatives is −1, and the whole last set if there are
    several.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = batch if groups is None else groups
    query = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    table = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * 1.5 / dim**0.5
    positive = torch.randint(rows, (batch,), generator=generator)
    negative = torch.randint(rows, (groups, count), generator=generator)
    if batch and count > 1:
        negative[0, count // 2] = positive[0]
    if padding:
        negative[torch.rand(groups, count, generator=generator) < 0.25] = -1
        if groups > 1:
            negative[-1] = -1
    if query_dtype is None:
        query_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    made = Inputs(query.to(query_dtype), table.to(dtype), positive.to(ids), negative.to(ids))
    return made.to(torch.device(device))


class Result(NamedTuple):
    outputs: tuple[Tensor, ...]
    query: Tensor  # gradient
    table: Tensor  # gradient, dense


def evaluate(
    function: Callable[..., Any],
    inputs: Inputs,
    *,
    upstream: Sequence[Tensor] | None = None,
    **options: Any,
) -> Result:
    """Outputs, and the gradients of their sum or of their product with ``upstream``."""
    query, table = (t.detach().requires_grad_() for t in (inputs.query, inputs.table))
    outputs = function(query, table, inputs.positive, inputs.negative, **options)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    if upstream is None:
        upstream = [torch.ones_like(o) for o in outputs]
    upstream = [u.to(o) for u, o in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, (query, table), upstream)
    return Result(tuple(o.detach() for o in outputs), grads[0], grads[1].to_dense())


def exact(function: Callable[..., Any], inputs: Inputs, **options: Any) -> Result:
    """The specification's result for the same numbers in fp64."""
    return evaluate(function, inputs.wide(), **options | {"backend": "reference"})


def assert_near(
    actual: Tensor, expected: Tensor, what: str = "", *, floor: float = 0.0, loose: float = 1.0
) -> None:
    """Equal up to rounding of the sums, and of the result if it has 16 bits.

    Args:
        floor: the magnitude of terms that cancel, if it is larger than the result's.
        loose: multiplies the tolerance, for sums of very many terms.
    """
    low = HALF_WIDTH.get(actual.dtype, 0.0)
    tolerance = loose * TOLERANCE.get(actual.dtype, TOLERANCE[torch.float32])
    known = expected[expected.isfinite()].abs()
    scale = max(floor, known.max().item()) if known.numel() else floor
    smallest = torch.finfo(actual.dtype).smallest_normal * low
    torch.testing.assert_close(
        actual.double().cpu(),
        expected.double().cpu(),
        rtol=low,
        atol=tolerance * scale + smallest,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def assert_agree(
    actual: Result, expected: Result, *, floor: float = 0.0, loose: float = 1.0
) -> None:
    """:func:`assert_near` for outputs and gradients; ``floor`` is for the gradients only."""
    for i, pair in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        assert_near(*pair, what=f"output {i}", loose=loose)
    for name in ("query", "table"):
        pair = (getattr(actual, name), getattr(expected, name))
        assert_near(*pair, what=f"gradient of {name}", floor=floor, loose=loose)


def same_bits(left: Result, right: Result) -> bool:
    pairs = zip((*left.outputs, *left[1:]), (*right.outputs, *right[1:]), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def random_like(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Upstream gradients of both signs, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]


def run_python(
    *arguments: str, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a separate Python process that imports the same copy of the package."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path} | (env or {}),
        text=True,
        capture_output=True,
        timeout=timeout,
    )
