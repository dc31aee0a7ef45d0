"""Batches of any shape, drawn by hypothesis if it is installed."""

from __future__ import annotations

import pytest
import torch

from emu_kernels import fused_emu_loss
from tests.ops.support import Inputs, Options, assert_agree, emulated, evaluate, exact, make

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def batches(draw: st.DrawFn) -> tuple[Inputs, Options]:
    per_set, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    inputs = make(
        per_set * groups,
        draw(st.integers(0, 20)),
        draw(st.integers(1, 70)),
        rows=draw(st.integers(1, 30)),
        groups=groups,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])),
        padding=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    options = {
        "mutation_rate": draw(st.sampled_from([0.0, 0.06, 0.5, 0.94, 1.0])),
        "beta": draw(st.sampled_from([0.0, 0.3])),
        "alpha": draw(st.sampled_from([0.0, 0.7])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "row_offset": draw(st.integers(0, 2**32 - 16)),
        "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
    }
    return inputs, options


def test_random_batches(kernel: str, device: torch.device) -> None:
    @settings(
        max_examples=10 if emulated(kernel, device) else 80,
        deadline=None,
        derandomize=True,
        database=None,
    )
    @given(batches())
    def agree(batch: tuple[Inputs, Options]) -> None:
        inputs, options = batch
        expected = exact(fused_emu_loss, inputs, **options)
        actual = evaluate(fused_emu_loss, inputs.to(device), backend=kernel, **options)
        assert_agree(actual, expected, floor=0.1)

    agree()
