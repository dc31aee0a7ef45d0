"""What is compared computes the same thing."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from bench import eager, native
from bench.inputs import TINY, Inputs, Shape, make
from bench.rivals import EMU, PHASES, RIVALS, Rival
from emu_kernels import fused_emu_loss, fused_softmax_loss
from emu_kernels.mask import mutation_mask, rate_to_threshold
from emu_kernels.similarity import SIMILARITIES
from tests.ops.support import Inputs as OperatorInputs
from tests.ops.support import assert_agree, evaluate

SEED = 5


@pytest.fixture
def inputs(device: torch.device) -> OperatorInputs:
    made = make(TINY)
    return OperatorInputs(made.query, made.table, made.positive, made.negative).to(device)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_eager_emu_is_the_fused_loss_given_the_same_mask(inputs, similarity, backend):
    mask = mutation_mask(
        TINY.batch,
        TINY.negatives,
        TINY.dim,
        seed=torch.tensor(SEED),
        row_offset=0,
        threshold=rate_to_threshold(EMU["mutation_rate"]),
    ).to(inputs.table.device)
    fused = evaluate(
        fused_emu_loss, inputs, seed=SEED, backend=backend, similarity=similarity, **EMU
    )
    for scores in eager.SPELLINGS[similarity]:
        for sparse in (False, True):
            options = {**EMU, "scores": scores, "sparse": sparse}
            assert_agree(evaluate(eager.emu_loss, inputs, mask=mask, **options), fused)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_eager_softmax_is_the_fused_loss(inputs, similarity, backend):
    fused = evaluate(fused_softmax_loss, inputs, backend=backend, similarity=similarity)
    for scores in eager.SPELLINGS[similarity]:
        assert_agree(evaluate(eager.softmax_loss, inputs, scores=scores), fused)


def test_eager_emu_draws_masks_at_the_rate():
    """With all components from the positive, mutated scores are the positive's: L_emu is known."""
    inputs = make(TINY)
    loss = eager.emu_loss(
        inputs.query, inputs.table, inputs.positive, inputs.negative,
        mutation_rate=1.0, beta=0.5, alpha=0.0,
    )  # fmt: skip
    count = TINY.negatives
    expected = torch.tensor(count + 1.0).log() * (1 + 0.5 * count) / count
    torch.testing.assert_close(loss, expected)


# One row without neighbours; cache lines not full; rows of the table that nothing names; negatives
# that no tile holds, and more ids than are looked at in one go.
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("by_segment", [False, True])
@pytest.mark.parametrize(
    "shape",
    [Shape(1, 1, 1, 1), Shape(7, 5, 19, 11), Shape(4, 3, 64, 1000), Shape(3, 2000, 50, 20)],
    ids=str,
)
def test_bare_scatter(shape: Shape, by_segment: bool, threads: None) -> None:
    inputs: Inputs = make(shape)
    rows = inputs.query.repeat_interleave(shape.negatives, dim=0)
    expected = torch.zeros_like(inputs.table).index_add(0, inputs.negative.flatten(), rows)
    for count in (1, 3):
        torch.set_num_threads(count)
        got = native.gather_scatter(inputs, by_segment=by_segment)
        torch.testing.assert_close(got, expected)


def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    reason = native.unavailable()
    native.library.cache_clear()
    assert reason is not None
    assert "no-such-compiler" in reason


def test_a_compiler_that_refuses_is_said(monkeypatch):
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    native.library.cache_clear()
    reason = native.unavailable()
    native.library.cache_clear()
    assert reason is not None
    assert "--no-such-flag" in reason or "no C++ compiler" in reason


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_rivals_run_and_name_their_instruction_set(rival: Rival, phase: str) -> None:
    reason = rival.unavailable(TINY)
    if reason is not None or phase not in rival.phases or rival.name == "compiled-emu":
        pytest.skip(reason or "has no such phase, or is tested elsewhere")
    step = rival.prepare(make(TINY), phase)
    step()
    step()
    assert rival.instruction_set("cpu").islower()


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
def test_phases_are_parts_of_the_whole(gradient: str) -> None:
    """Forward gives the loss, backward the gradients of a loss that is there."""
    inputs = make(dataclasses.replace(TINY, gradient=gradient))
    rival = next(r for r in RIVALS if r.name == "eager-softmax")
    loss, of_backward, of_whole = (rival.prepare(inputs, phase)() for phase in PHASES)
    assert loss.shape == ()
    assert of_backward[1].is_sparse == (gradient == "sparse")
    for part, whole in zip(of_backward, of_whole, strict=True):
        assert torch.equal(part.to_dense(), whole.to_dense())


def test_the_fastest_spelling_can_run_in_16_bits():
    for similarity in SIMILARITIES:
        shape = dataclasses.replace(TINY, similarity=similarity, dtype="bfloat16")
        inputs = make(shape)
        scores = eager.fastest(inputs)
        assert scores in eager.SPELLINGS[similarity]
        assert scores(inputs.query, inputs.table[inputs.negative]).dtype == torch.bfloat16
