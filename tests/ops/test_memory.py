"""No memory of size B·K·D, little saved for backward, no N·D with sparse gradients."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import emu_scores, fused_emu_loss, fused_softmax_loss
from emu_kernels.similarity import SIMILARITIES
from tests.ops.peak_memory import CASES, CUBE, PROCESS
from tests.ops.support import LOSS, Inputs, Options, emulated, make, run_python

LIMIT = dict.fromkeys(CASES, CUBE // 8)
"""A (B, K) tensor takes 1 MB, like the table, and a (B, K, D) tensor 134 MB. The limit allows a
dozen of the former, but not one of the latter, even with one or two bytes per component."""

LIMIT["sparse"] = 128 * 2**20
"""Allows a word for each of the ten million rows, but not a tenth of the dense gradient."""


def peaks(backend: str, *cases: str) -> dict[str, int]:
    if not (PROCESS / "clear_refs").exists():
        pytest.skip("peak resident memory is read from Linux's /proc/self")
    done = run_python("-m", "tests.ops.peak_memory", backend, *cases)
    assert done.returncode == 0, done.stderr
    measured = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
    return {case: int(added) for case, added in measured.items()}


@pytest.mark.usefixtures("compiled")
def test_peak(kernel: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("resident memory says nothing about a GPU's")
    if emulated(kernel, device):
        pytest.skip(f"{kernel} is emulated in this process alone, and is slow on these shapes")
    measured = peaks(kernel, *CASES)
    assert measured.keys() == CASES.keys()
    assert {case: added for case, added in measured.items() if added >= LIMIT[case]} == {}


def test_the_measurement_sees_large_tensors() -> None:
    assert peaks("reference", "softmax")["softmax"] > CUBE


def saved_bytes(function: Callable[..., Any], inputs: Inputs, **options: Any) -> int:
    """Bytes that autograd saves for the backward pass, not counting the inputs."""
    query, table = (t.detach().requires_grad_() for t in inputs[:2])
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = function(query, table, *inputs[2:], **options)
    for tensor in (query, table, *inputs[2:]):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert outputs is not None
    return sum(storages.values())


def sizes(kernel: str, device: torch.device) -> tuple[int, int, int]:
    """B, K and D, with B·K·D far larger than what may be saved."""
    return (4, 32, 100) if kernel == "triton" and emulated(kernel, device) else (64, 48, 100)


def test_saved_for_backward(kernel: str, device: torch.device) -> None:
    batch, count, dim = sizes(kernel, device)
    inputs = make(batch, count, dim, rows=50, device=device)
    options: Options = {"backend": kernel}
    scores, vectors = batch * count * 4, batch * dim * 4
    vanilla = saved_bytes(fused_softmax_loss, inputs, **options)
    emu = saved_bytes(fused_emu_loss, inputs, **LOSS, **options)
    assert 0 < vanilla <= 2 * scores + 2 * vectors + 1024
    assert emu - vanilla <= 2 * scores
    built = saved_bytes(emu_scores, inputs, mutation_rate=0.5, seed=1, **options)
    assert built <= 2 * scores + 2 * vectors + 1024


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_saved_for_backward_of_similarities(
    similarity: str, kernel: str, device: torch.device
) -> None:
    """One weight for each sum and negative; with EMU twice as many."""
    batch, count, dim = sizes(kernel, device)
    inputs = make(batch, count, dim, rows=50, device=device)
    options: Options = {"backend": kernel, "similarity": similarity}
    weights = batch * count * 4 * SIMILARITIES[similarity].sums
    vectors = batch * dim * 4
    vanilla = saved_bytes(fused_softmax_loss, inputs, **options)
    emu = saved_bytes(fused_emu_loss, inputs, **LOSS, **options)
    assert 0 < vanilla <= weights + 2 * vectors + 1024
    assert emu - vanilla <= min(weights, 2 * batch * count * 4)


def test_nothing_is_saved_without_gradients(kernel: str, device: torch.device) -> None:
    inputs = make(device=device)
    with torch.no_grad():
        assert saved_bytes(fused_emu_loss, inputs, backend=kernel, **LOSS) == 0


def pages(address: int) -> set[str]:
    """The kernel's flags of the memory mapping that contains an address (proc(5), VmFlags)."""
    inside = False
    for line in (PROCESS / "smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            begin, end = (int(x, 16) for x in line.split()[0].split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise LookupError(hex(address))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the system has no huge pages"
)
@pytest.mark.parametrize("sparse", [False, True])
def test_large_gradients_ask_for_large_pages(sparse: bool) -> None:
    """The system provides their memory anew at each step, which small pages make slow."""
    small, large = 2**10, 2**17  # rows; of 512 bytes
    for rows in (small, large):
        inputs = make(2, rows // 2, 128, rows=rows)
        inputs.negative[:] = torch.arange(rows).view(2, -1)
        table = inputs.table.requires_grad_()
        fused_emu_loss(
            inputs.query, table, inputs.positive, inputs.negative,
            backend="cpu", sparse_grad=sparse, **LOSS,
        ).backward()  # fmt: skip
        assert table.grad is not None
        gradient = table.grad._values() if sparse else table.grad
        middle = gradient.data_ptr() + gradient.nbytes // 2
        assert ("hg" in pages(middle)) == (rows == large)
