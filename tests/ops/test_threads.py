"""Threads: the same bits for any number of them, for calls from any of them, and after a fork."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import _C, backends, emu_mutate, emu_scores, fused_emu_loss, fused_softmax_loss
from tests.ops.support import (
    LOSS,
    Inputs,
    Options,
    Result,
    emulated,
    evaluate,
    make,
    run_python,
    same_bits,
)


def one_entity() -> Inputs:
    """Every id is the same, so all contributions are in one segment."""
    inputs = make(120, 64, 100, rows=4)
    inputs.positive.fill_(2)
    inputs.negative.fill_(2)
    return inputs


def few_entities() -> Inputs:
    """One large segment among small ones."""
    inputs = make(120, 64, 100, rows=300, padding=True)
    inputs.negative[:, ::2] = 1
    return inputs


BATCHES: dict[str, Callable[[], Inputs]] = {
    "own negatives": lambda: make(120, 64, 100, rows=300),
    "shared negatives": lambda: make(120, 300, 100, rows=300, groups=1),
    "blocks": lambda: make(120, 64, 100, rows=300, groups=4),
    "one entity": one_entity,
    "few entities": few_entities,
    "fewer rows than threads": lambda: make(2, 1000, 100, rows=300),
    "bfloat16": lambda: make(120, 64, 100, rows=30, dtype=torch.bfloat16),
}


def compute(inputs: Inputs, backend: str) -> list[Result]:
    calls: list[tuple[Callable[..., Any], Options]] = [
        (fused_emu_loss, LOSS),
        (fused_emu_loss, LOSS | {"reduction": "none", "sparse_grad": True}),
        (fused_softmax_loss, {"reduction": "sum"}),
        (emu_scores, {"mutation_rate": 0.5, "seed": 1}),
    ]
    return [evaluate(function, inputs, backend=backend, **options) for function, options in calls]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Then losses with shared negatives do not use torch's matrix products."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("threads", "compiled", "deterministic")
@pytest.mark.parametrize("name", BATCHES)
def test_same_bits_for_any_number(name: str, kernel: str, device: torch.device) -> None:
    if emulated(kernel, device):
        pytest.skip(f"{kernel} is emulated by one thread")
    inputs = BATCHES[name]().to(device)
    torch.set_num_threads(1)
    expected = compute(inputs, kernel)
    for number in (2, 3, 7):
        torch.set_num_threads(number)
        for actual, wanted in zip(compute(inputs, kernel), expected, strict=True):
            assert same_bits(actual, wanted)


@pytest.mark.usefixtures("threads", "compiled")
def test_mutate_has_the_same_bits_for_any_number(kernel: str, device: torch.device) -> None:
    if emulated(kernel, device):
        pytest.skip(f"{kernel} is emulated by one thread")
    positive = torch.randn(30, 100, device=device, requires_grad=True)
    negative = torch.randn(30, 64, 100, device=device, requires_grad=True)

    def outcome() -> list[Tensor]:
        out = emu_mutate(positive, negative, mutation_rate=0.5, seed=1, backend=kernel)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (positive, negative))]

    torch.set_num_threads(1)
    expected = outcome()
    for number in (2, 3, 7):
        torch.set_num_threads(number)
        assert all(map(torch.equal, outcome(), expected))


@pytest.mark.skipif(
    not (sys.platform.startswith("linux") and "+cpu" in torch.__version__),
    reason="elsewhere torch may be built on other threads",
)
def test_torch_is_joined() -> None:
    """With the torch that `make` installs, the kernels run on torch's own threads.

    Two sets of threads would compete for the cores.
    """
    assert _C.joins_torch()


SHARE_THREADS = """
import os, torch
from tests.ops.support import LOSS, evaluate, make
from emu_kernels import fused_emu_loss

def use_torch():
    torch.ones(1 << 22).exp_()
    return set(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
before = use_torch()
for batch in (3, 64):  # with less to do than there are threads, and with more
    evaluate(fused_emu_loss, make(batch, 256, 32, rows=300), backend="cpu", **LOSS)
assert use_torch() == before
"""


@pytest.mark.skipif(not _C.joins_torch(), reason="torch's threads are not used")
def test_no_other_threads() -> None:
    """Kernels neither start threads beside torch's, nor make torch restart its own."""
    done = run_python("-c", SHARE_THREADS)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("threads", "compiled")
def test_concurrent_calls(kernel: str, device: torch.device) -> None:
    """Python threads that call at once do not disturb each other."""
    torch.set_num_threads(3)
    batches = [make(40, 64, 36, rows=50, seed=seed, device=device) for seed in range(4)]
    expected = [compute(inputs, kernel) for inputs in batches]

    def repeat(inputs: Inputs) -> list[list[Result]]:
        torch.set_num_threads(3)
        return [compute(inputs, kernel) for _ in range(5)]

    with ThreadPoolExecutor(len(batches)) as executor:
        for wanted, runs in zip(expected, executor.map(repeat, batches), strict=True):
            for run in runs:
                assert all(map(same_bits, run, wanted))


FORK = """
import os, signal, sys, threading, torch
from functools import partial
from emu_kernels import (
    RelationalGraph, emu_mutate, fused_emu_loss, fused_softmax_loss, one_vs_all_loss,
    relational_spmm, uls_cross_entropy,
)
from emu_kernels.negatives import Negatives
from tests.ops.support import LOSS, evaluate, make, same_bits

def compute():
    return evaluate(fused_emu_loss, inputs, backend="cpu", **LOSS)

def in_a_child(compute, right):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs is ended, and its exit status says so
        os._exit(0 if right(compute()) and right(compute()) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

torch.set_num_threads(4)
inputs = make(40, 1000, 36, rows=50)  # enough ids for torch to share them out
expected = compute()
right = partial(same_bits, expected)
assert in_a_child(compute, right) == 0, "idle"

query, table = torch.rand(64, 33), torch.rand(5000, 33)
positive, negative = torch.arange(64), torch.arange(2100).expand(64, 2100).contiguous()
narrow, scores, rate = negative.int(), torch.rand(64, 2100, dtype=torch.half), torch.rand(33)
rows, edges = torch.rand(1000, 2, 33, dtype=torch.half), torch.arange(40_000).view(2, -1) % 1000
graph = RelationalGraph(edges, edges[0] % 5, 1000, 5)
triples = torch.stack([edges[0], edges[1] % 5, edges[1]], dim=1)
negatives = partial(Negatives, triples, 1000, 5, batch_size=1000, count=256)
for call in (
    lambda: fused_softmax_loss(query, table, positive, negative[0]),  # by products
    lambda: fused_softmax_loss(query, table, positive.int(), narrow),
    lambda: fused_softmax_loss(query, table, positive, negative, log_q=table[:, 0]),
    lambda: one_vs_all_loss(query, table, positive),
    lambda: uls_cross_entropy(scores[:, 0], scores, beta=0.3),
    lambda: emu_mutate(rows[:, 0], rows, mutation_rate=rate, seed=1),
    lambda: relational_spmm(rows, rows[:5, 0], graph),
    lambda: RelationalGraph(edges, edges[0] % 5, 1000, 5).sorted[0],
    lambda: negatives()(0, edges[0, :1000], edges[1, :1000] % 5),
):
    wanted = call()
    assert in_a_child(call, lambda x: torch.allclose(x, wanted)) == 0

stop = threading.Event()
def keep_busy():
    while not stop.is_set():
        compute()
busy = threading.Thread(target=keep_busy)
busy.start()
statuses = [in_a_child(compute, right) for _ in range(10)]
stop.set()
busy.join()
assert statuses == [0] * 10, statuses
assert same_bits(compute(), expected), "the parent"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_fork() -> None:
    """A forked child can call kernels, even if the parent was in the middle of a call."""
    done = run_python("-c", FORK)
    assert done.returncode == 0, done.stderr


@dataclass
class Watched:
    """The extension module; a call of one of its functions first releases a lock."""

    function: str
    gate: threading.Lock
    order: list[str]

    def __getattr__(self, name: str) -> Any:
        found = getattr(_C, name)
        if name != self.function:
            return found

        def enter(*args: Any, **kwargs: Any) -> Any:
            self.gate.release()
            out = found(*args, **kwargs)
            self.order.append("kernel returned")
            return out

        return enter


@pytest.fixture
def _reluctant() -> Iterator[None]:
    """A thread gets the interpreter only when another one releases it, not after an interval."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(100)
    yield
    sys.setswitchinterval(before)


def train(inputs: Inputs) -> None:
    evaluate(fused_emu_loss, inputs, backend="cpu", **LOSS)


def score(inputs: Inputs) -> None:
    evaluate(emu_scores, inputs, backend="cpu", mutation_rate=0.5, seed=1)


def mutate(inputs: Inputs) -> None:
    negative = inputs.table[inputs.negative[:64]].requires_grad_()
    emu_mutate(
        inputs.table[:64], negative, mutation_rate=0.5, seed=1, backend="cpu"
    ).sum().backward()


@pytest.mark.usefixtures("_reluctant", "threads")
@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("loss_forward", train),
        ("sort_ids", train),
        ("table_gradient", train),
        ("scores_forward", score),
        ("query_gradient", score),
        ("mutate_forward", mutate),
        ("mutate_backward", mutate),
    ],
)
def test_interpreter_is_free_while_a_kernel_runs(
    function: str, call: Callable[[Inputs], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another Python thread, released as the kernel starts, runs before the kernel returns."""
    torch.set_num_threads(1)
    inputs = make(1500, 256, 256, rows=500)
    for _attempt in range(10):  # the other thread may be slow to wake up
        order: list[str] = []
        gate, ready = threading.Lock(), threading.Event()
        gate.acquire()

        def other(gate=gate, ready=ready, order=order) -> None:
            ready.set()
            gate.acquire()
            order.append("other thread ran")

        thread = threading.Thread(target=other)
        thread.start()
        ready.wait()
        with monkeypatch.context() as patch:
            patch.setattr(backends.get("cpu"), "_native", Watched(function, gate, order))
            call(inputs)
        thread.join()
        if order[0] == "other thread ran":
            return
    pytest.fail(f"{function} kept other Python threads waiting")
