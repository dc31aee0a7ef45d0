"""Compiles the kernels that the backend would launch on a GPU, without one; reads the machine code.

The launches are recorded from calls with tensors on the CPU, so block sizes and specializations are
the backend's own. Triton gets a driver that only names a target. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import triton
from emu_kernels import RelationalGraph, relational
from emu_kernels.backends.base import ScoreWeights, SumWeights, new_scores
from emu_kernels.mutation import Component, Expected, Mixup, Mutation, NoMutation, Pair
from emu_kernels.request import LossRequest
from emu_kernels.similarity import SIMILARITIES
from emu_kernels.triton import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MUTATIONS: dict[str, Mutation] = {
    "none": NoMutation(),
    "component": Component(threshold=156),
    "pair": Pair(threshold=156),
    "mixup": Mixup(),
    "rates": Component(),  # with a threshold for each component
    "expected": Expected(0.6),
    "learned": Expected(0.6, learned=True),  # with rates of each row
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    warps: int
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments that are constants of the compiled kernel."""
        named = {name: value for name, value in self.arguments.items() if name.isupper()}
        return named | (self.arguments["kind"]._asdict() if "kind" in self.arguments else {})

    @property
    def types(self) -> tuple[str, ...]:
        given = (*self.arguments.values(), *self.arguments.get("inputs", ()))
        return tuple(
            str(value.dtype) if isinstance(value, torch.Tensor) else str(value is None)
            for value in given
        )


@dataclass(frozen=True)
class Compiled:
    name: str
    target: str
    registers: int
    spilled: int  # registers on AMD, bytes on NVIDIA
    shared: int  # bytes
    longest: int  # instructions of the longest innermost loop, or of the kernel if it has none
    components: int  # of a tile, for each thread
    sizes_matter: bool  # whether other sizes need another compilation

    @property
    def instructions(self) -> float:
        """In the loop, for each component."""
        return self.longest / self.components


def request(
    similarity: str,
    mutation: str,
    *,
    dtype: torch.dtype = torch.float32,
    rows: int = 1024,
    count: int = 256,
    dim: int = 100,
    entities: int = 14541,
    scale: bool = True,
) -> LossRequest:
    """A request with the given sizes; the values of its tensors are never read."""
    takes = SIMILARITIES[similarity]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    width = dim // takes.halves * takes.scaled_halves
    rule = MUTATIONS[mutation]
    if mutation == "rates":
        rule = Component(thresholds=torch.empty(dim, dtype=torch.int16))
    if isinstance(rule, Expected):
        shape = (rows, dim // 2 if takes.coupled else dim) if rule.learned else (1, 1)
        rule = replace(rule, rate=torch.empty(shape, dtype=real))
    return LossRequest(
        query=torch.empty(rows, dim, dtype=real),
        table=torch.empty(entities, dim, dtype=dtype),
        scale=torch.empty(rows, width, dtype=real) if scale and width else None,
        weights=torch.empty(takes.weights, dtype=real) if takes.weights else None,
        positive=torch.zeros(rows, dtype=torch.int64),
        negative=torch.zeros(rows, count, dtype=torch.int64),
        seed=torch.tensor(0),
        row_offset=0,
        mutation=rule,
        similarity=similarity,
        phase_scale=1.5 if takes.phases else 1.0,
        sparse_grad=False,
        beta=0.5,
        alpha=0.1,
        coefficients=None,
        sample_weight=None,
        reduction="mean",
    )


@contextmanager
def recording() -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, warps: int, **arguments: Any) -> None:
        launches.append(Launch(kernel, warps, arguments))

    before = launch.run
    launch.run = record
    try:
        yield launches
    finally:
        launch.run = before


def step(made: LossRequest, *, every: bool = False) -> list[Launch]:
    """The launches of a loss and its backward pass, or of all of the backend's functions."""
    with recording() as launches:
        state = launch.loss_forward(made, need_grad=True)
        sums = SumWeights(*[getattr(state, name) for name in SumWeights._fields])
        launch.table_gradient(made, sums, atomic=False)
        if every:
            launch.table_gradient(made, sums, atomic=True)
            launch.loss_forward(made, need_grad=False)
            launch.query_gradient(made, ScoreWeights(*new_scores(made)))
            if made.moments is None:
                negative = made.query.new_empty(*made.negative.shape, made.query.shape[1])
                launch.mutate_forward(made.query, negative, made)
                launch.mutate_backward(negative, made)
    return launches


def messages(
    message: str,
    aggregate: str,
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 16,
    dim: int = 32,
    shared: bool = False,
    weighted: bool = False,
) -> list[Launch]:
    """The launches of relational messages and their backward pass, as for NBFNet: with own messages
    and with edges left out, or none if they are weighted. The graph's values are never read."""
    graph = RelationalGraph(torch.zeros(2, 1).long(), torch.zeros(1).long(), 1, 1)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    given = {
        "nodes": torch.empty(1, batch, dim, dtype=dtype),
        "relations": torch.empty((1, dim) if shared else (1, batch, dim), dtype=dtype),
        "own": torch.empty(1, batch, dim, dtype=real),
        "weight": torch.empty(1, dtype=real) if weighted else None,
        "keep": None if weighted else torch.ones(1, dtype=torch.bool),
        "num_relations": 1,
        "graph": list(graph.sorted),
        "message": message,
        "aggregate": aggregate,
        "backend": "triton",
    }
    with recording() as launches:
        out = relational._forward(given)
        relational._backward(given | {"grad": out, "result": out, "with_own": True})
    return launches


@contextmanager
def target(name: str) -> Iterator[None]:
    fake = SimpleNamespace(
        get_current_device=lambda: name,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGETS[name],
    )
    before = driver._active
    driver.set_active(fake)
    try:
        yield
    finally:
        driver._active = before


def build(launched: Launch, name: str) -> Any:
    """The kernel as Triton compiles it for the named target."""
    with target(name):
        return launched.kernel.run(
            grid=(1,), warmup=True, **launched.arguments, num_warps=launched.warps,
            enable_fp_fusion=False,
        )  # fmt: skip


VARYING = ("B", "K", "N", "row_offset", "threshold", "entries", "negatives")


def resized(launched: Launch) -> Iterator[Launch]:
    """The launch with sizes that Triton may specialize for: 1, and a number not divisible by 16."""
    for size in (1, 7):
        sizes = {name: size for name in VARYING if name in launched.arguments}
        yield replace(launched, arguments=launched.arguments | sizes)


def inspect(launched: Launch, name: str) -> Compiled:
    kernel = build(launched, name)
    given = launched.constants
    tile = given["BLOCK"] if "BLOCK" in given else given.get("ROWS", 1) * given["WIDTH"]
    tile *= given.get("PARTS", 1)
    lanes = TARGETS[name].warp_size * launched.warps
    if name.startswith("gfx"):
        registers, spilled, longest = read_amdgcn(kernel.asm["amdgcn"])
    else:
        registers, spilled, longest = read_cubin(kernel.asm["cubin"])
    return Compiled(
        launched.name, name, registers, spilled, kernel.metadata.shared, longest,
        max(1, tile // lanes), any(build(other, name) is not kernel for other in resized(launched)),
    )  # fmt: skip


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], check=True, capture_output=True, text=True
    ).stdout


def read_cubin(cubin: bytes) -> tuple[int, int, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "kernel.cubin")
        Path(file).write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", file)
        sass = _run("nvdisasm", "-c", file)
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    local = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    return registers, local, innermost(sass, r"^\s*/\*[0-9a-f]+\*/\s+(.*)", r"BRA\S* .*`\((\S+)\)")


def read_amdgcn(text: str) -> tuple[int, int, int]:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
    # Scalar registers are spilled to lanes of vector registers, not to memory.
    spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # type: ignore[index]
    return registers, spilled, innermost(text, r"^\t([a-z].*)", r"s_c?branch\S*\s+(\S+)")


def innermost(text: str, instruction: str, branch: str) -> int:
    """Length of the longest loop without another loop inside; of all code if there is no loop."""
    labels: dict[str, int] = {}
    loops: set[tuple[int, int]] = set()
    count = 0
    for line in text.splitlines():
        if label := re.match(r"^(\.?\w[\w.$]*):", line):
            labels[label[1]] = count
        elif code := re.match(instruction, line):
            count += 1
            if (jump := re.search(branch, code[1])) and labels.get(jump[1], count) < count - 1:
                loops.add((labels[jump[1]], count))
    inner = (
        end - start
        for start, end in loops
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in loops)
    )
    return max(inner, default=count)
