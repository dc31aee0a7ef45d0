"""Every wrong argument raises before a kernel runs; the message has its name and value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from emu_kernels import (
    EMULoss,
    backends,
    emu_mutate,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
    uls_cross_entropy,
)
from emu_kernels.mutation import Component
from tests.ops.support import LOSS, Options, device_of, emulated, make

Change = Callable[[Options], Any]  # the good arguments -> the bad value of one of them


def with_id(name: str, value: int) -> Change:
    """The argument with one id replaced."""

    def change(good: Options) -> Tensor:
        ids = good[name].clone()
        ids.view(-1)[-2] = value
        return ids

    return change


def always(value: Any) -> Change:
    return lambda good: value


Case = tuple[str, Change, type[Exception], str]  # argument, bad value, exception, part of message

# B = 6, K = 5, D = 20, N = 9, G = 6.
TENSORS: list[Case] = [
    ("query", always([[1.0]]), TypeError, "list"),
    ("query", lambda a: numpy.ones((6, 20)), TypeError, "ndarray"),
    ("query", lambda a: a["query"][0], ValueError, r"\(20,\)"),
    ("query", lambda a: a["query"][None], ValueError, r"\(1, 6, 20\)"),
    ("query", lambda a: a["query"][:5], ValueError, r"\(6,\)"),
    ("query", lambda a: a["query"][:, :0], ValueError, r"\(6, 0\)"),
    ("query", lambda a: a["query"].long(), TypeError, "int64"),
    ("query", lambda a: a["query"].to(torch.complex64), TypeError, "complex64"),
    ("query", lambda a: a["query"].double(), TypeError, "float64"),
    ("query", lambda a: a["query"].to("meta"), ValueError, "meta"),
    ("table", always(None), TypeError, "NoneType"),
    ("table", lambda a: a["table"][0], ValueError, r"\(20,\)"),
    ("table", lambda a: a["table"][:, :19], ValueError, r"\(9, 19\)"),
    ("table", lambda a: a["table"][:, None], ValueError, r"\(9, 1, 20\)"),
    ("table", lambda a: a["table"].int(), TypeError, "int32"),
    ("table", lambda a: a["table"].to(torch.float8_e5m2), TypeError, "float8_e5m2"),
    ("table", lambda a: a["table"].double(), TypeError, "float64"),
    ("table", lambda a: a["table"].to_sparse(), TypeError, "sparse"),
    ("table", lambda a: a["table"][:0], IndexError, "positive"),
    ("positive", always(3), TypeError, "int"),
    ("positive", lambda a: a["positive"][0], ValueError, r"\(\)"),
    ("positive", lambda a: a["positive"][:, None], ValueError, r"\(6, 1\)"),
    ("positive", lambda a: a["positive"][:5], ValueError, r"\(5,\)"),
    ("positive", lambda a: a["positive"].float(), TypeError, "float32"),
    ("positive", lambda a: a["positive"].bool(), TypeError, "bool"),
    ("positive", lambda a: a["positive"].to("meta"), ValueError, "meta"),
    ("positive", with_id("positive", 9), IndexError, "got 9 at index 4"),
    ("positive", with_id("positive", -1), IndexError, "got -1 at index 4"),
    ("positive", with_id("positive", 2**40), IndexError, f"got {2**40}"),
    ("negative", always([0, 1]), TypeError, "list"),
    ("negative", lambda a: a["negative"][0, 0], ValueError, r"\(\)"),
    ("negative", lambda a: a["negative"][None], ValueError, r"\(1, 6, 5\)"),
    ("negative", lambda a: a["negative"][:4], ValueError, r"\(4, 5\)"),
    ("negative", lambda a: a["negative"][:0], ValueError, r"\(0, 5\)"),
    ("negative", lambda a: a["negative"].repeat(2, 1), ValueError, r"\(12, 5\)"),
    ("negative", lambda a: a["negative"].half(), TypeError, "float16"),
    ("negative", lambda a: a["negative"].to("meta"), ValueError, "meta"),
    ("negative", with_id("negative", 9), IndexError, r"got 9 at index \(5, 3\)"),
    ("negative", with_id("negative", -2), IndexError, r"got -2 at index \(5, 3\)"),
    ("negative", with_id("negative", -(2**63)), IndexError, f"got -{2**63}"),
    ("similarity", always("cosine"), ValueError, "'dot'.*'cosine'"),
    ("similarity", always(None), ValueError, "'dot'.*None"),
    ("scale", lambda a: torch.ones(6, 20), ValueError, "dot"),
    ("similarity_weights", lambda a: torch.ones(2), ValueError, "dot"),
    ("sparse_grad", always("no"), TypeError, "True or False, got 'no'"),
]


def rate(name: str, *, optional: bool = False) -> list[Case]:
    return [
        (name, always(-0.01), ValueError, "-0.01"),
        (name, always(1.01), ValueError, "1.01"),
        (name, always(math.nan), ValueError, "nan"),
        (name, always(math.inf), ValueError, "inf"),
        (name, always("0.5"), TypeError, "str"),
        (name, always(True), TypeError, "bool"),
        *([] if optional else [(name, always(None), TypeError, "NoneType")]),
        # Users pass rates, not the rules that are made from them.
        (name, always(Component(thresholds=torch.zeros(3))), TypeError, "Component"),
        (name, lambda a: torch.tensor(1), ValueError, r"got shape \(\), dtype torch.int64"),
        (name, lambda a: torch.tensor(0.5).to_sparse(), TypeError, "sparse"),
        (name, lambda a: numpy.float32(1.5), ValueError, "1.5"),
    ]


def coefficient(name: str) -> list[Case]:
    return [
        (name, always(-0.01), ValueError, "-0.01"),
        (name, always(math.nan), ValueError, "nan"),
        (name, always(math.inf), ValueError, "inf"),
        (name, always("0.5"), TypeError, "str"),
        (name, always(None), TypeError, "NoneType"),
        (name, lambda a: torch.tensor(-0.5), ValueError, "-0.5"),
        (name, lambda a: torch.tensor(math.nan), ValueError, "nan"),
        (name, lambda a: torch.ones(2), ValueError, r"\(2,\)"),
        (name, lambda a: torch.tensor(1), ValueError, "int64"),
        (name, lambda a: torch.tensor(0.5).to_sparse(), TypeError, "sparse"),
        (name, lambda a: torch.tensor(0.5).requires_grad_(), ValueError, "detach"),
    ]


SEED: list[Case] = [
    ("seed", always(-1), ValueError, "-1"),
    ("seed", always(2**63), ValueError, str(2**63)),
    ("seed", always(1.5), TypeError, "float"),
    ("seed", always("1"), TypeError, "str"),
    ("seed", always(numpy.int64(-1)), ValueError, "-1"),
    ("seed", always(numpy.float32(1.0)), TypeError, "float32"),
    ("seed", lambda a: torch.tensor([1, 2]), ValueError, r"\(2,\)"),
    ("seed", lambda a: torch.tensor(1.0), ValueError, "float32"),
    ("seed", lambda a: torch.tensor(1).to_sparse(), TypeError, "sparse"),
    ("seed", lambda a: torch.tensor(1, device="meta"), ValueError, "meta"),
    ("row_offset", always(-1), ValueError, "-1"),
    ("row_offset", always(2**32 - 5), ValueError, str(2**32 - 5)),
    ("row_offset", always(1.0), TypeError, "float"),
    ("row_offset", lambda a: torch.tensor(1.0), TypeError, "Tensor"),
    ("row_offset", lambda a: torch.tensor(-1), ValueError, "-1"),
]
REDUCTION: list[Case] = [
    ("reduction", always("avg"), ValueError, "'none', 'sum', 'mean'.*'avg'"),
    ("reduction", always(None), ValueError, "'none', 'sum', 'mean'.*None"),
]
WEIGHT: list[Case] = [
    ("sample_weight", always([1.0] * 6), TypeError, "list"),
    ("sample_weight", lambda a: torch.ones(6, 1), ValueError, r"\(6, 1\)"),
    ("sample_weight", lambda a: torch.ones(5), ValueError, r"\(5,\)"),
    ("sample_weight", lambda a: torch.ones(6, dtype=torch.int64), TypeError, "int64"),
    ("sample_weight", lambda a: torch.ones(6, device="meta"), ValueError, "meta"),
]
BACKEND: list[Case] = [
    ("backend", always("tpu"), ValueError, ".*".join(map(repr, (*backends.NAMES, "tpu")))),
    ("backend", always(7), ValueError, "'reference'.*7"),
]
MARGIN: list[Case] = [
    ("margin", always("24"), TypeError, "str"),
    ("margin", always(math.nan), ValueError, "nan"),
]
MUTATE: list[Case] = [
    ("positive", always(1.0), TypeError, "float"),
    ("positive", lambda a: a["positive"][0], ValueError, r"\(4,\)"),
    ("positive", lambda a: a["positive"][:1], ValueError, r"\(2, 3, 4\)"),
    ("positive", lambda a: a["positive"][:, :3], ValueError, r"\(2, 3, 4\)"),
    ("positive", lambda a: a["positive"].long(), TypeError, "int64"),
    ("positive", lambda a: a["positive"].bfloat16(), TypeError, "bfloat16"),
    ("positive", lambda a: a["positive"].to("meta"), ValueError, "meta"),
    ("negative", always(None), TypeError, "NoneType"),
    ("negative", lambda a: a["negative"][0], ValueError, r"\(3, 4\)"),
    ("negative", lambda a: a["negative"].bool(), TypeError, "bool"),
    ("negative", lambda a: a["negative"].double(), TypeError, "float64"),
]
ULS: list[Case] = [
    ("positive_score", always(1.0), TypeError, "float"),
    ("positive_score", lambda a: a["positive_score"][:, None], ValueError, r"\(2, 1\)"),
    ("positive_score", lambda a: a["positive_score"][:1], ValueError, r"\(2, 3\)"),
    ("positive_score", lambda a: a["positive_score"].int(), TypeError, "int32"),
    ("positive_score", lambda a: a["positive_score"].double(), TypeError, "float64"),
    ("positive_score", lambda a: a["positive_score"].to("meta"), ValueError, "meta"),
    ("negative_score", always(None), TypeError, "NoneType"),
    ("negative_score", lambda a: a["negative_score"][0], ValueError, r"\(3,\)"),
    ("negative_score", lambda a: a["negative_score"].bool(), TypeError, "bool"),
]

LOSS_CASES = [
    *TENSORS,
    *rate("mutation_rate"),
    *coefficient("beta"),
    *coefficient("alpha"),
    *SEED,
    *REDUCTION,
    *WEIGHT,
    *BACKEND,
]


def ids(cases: list[Case]) -> list[str]:
    return [f"{name}-{i}" for i, (name, *_) in enumerate(cases)]


def check(function: Callable[..., Any], good: Options, case: Case) -> None:
    """Good arguments are accepted; the exception has the bad one's name and value."""
    name, change, exception, part = case
    backend = good.get("backend", backends.REFERENCE)
    if exception is not IndexError and emulated(backend, device_of(backend)):
        pytest.skip("checked before any backend has a part in it")
    bad = change(good)
    if isinstance(bad, Tensor) and bad.device.type == "cpu":  # not a wrong device too
        bad = bad.to(device_of(backend))
    function(**good)
    with pytest.raises(exception, match=f"(?s){part}") as caught:
        function(**good | {name: bad})
    # If two arguments disagree, the message may begin with the other one, but names both.
    assert name in str(caught.value) or exception is IndexError


@pytest.fixture(autouse=True)
def _check_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check ids in the call itself, on a GPU too, where kernels would report them later."""
    monkeypatch.setenv("EMU_KERNELS_CHECK", "1")


def skip_if_only_the_kernels_read_it(case: Case, backend: str, device: torch.device) -> None:
    """Skip a coefficient on a GPU, emulated or not: it is not read before the launch, and a bad one
    gives NaN."""
    name, change, exception, _ = case
    of_gpu = emulated(backend, device) or device.type != "cpu"
    if name in ("beta", "alpha") and exception is ValueError and of_gpu:
        value = change({})
        scalar = isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1
        if scalar and not value.requires_grad:
            pytest.skip(f"{backend} does not look at the value before its kernels run")


def batch(device: torch.device) -> Options:
    inputs = make(6, 5, 20, rows=9, padding=True, device=device)
    return inputs._asdict()


@pytest.mark.parametrize("case", LOSS_CASES, ids=ids(LOSS_CASES))
def test_loss(case: Case, backend: str, device: torch.device) -> None:
    skip_if_only_the_kernels_read_it(case, backend, device)
    check(fused_emu_loss, batch(device) | LOSS | {"backend": backend}, case)


SOFTMAX_CASES = [*TENSORS, *REDUCTION, *WEIGHT, *BACKEND]


@pytest.mark.parametrize("case", SOFTMAX_CASES, ids=ids(SOFTMAX_CASES))
def test_softmax_loss(case: Case, backend: str, device: torch.device) -> None:
    check(fused_softmax_loss, batch(device) | {"backend": backend}, case)


SCORES_CASES = [*TENSORS, *rate("mutation_rate", optional=True), *SEED, *MARGIN, *BACKEND]


@pytest.mark.parametrize("case", SCORES_CASES, ids=ids(SCORES_CASES))
def test_scores(case: Case, backend: str, device: torch.device) -> None:
    check(emu_scores, batch(device) | {"mutation_rate": 0.5, "seed": 1, "backend": backend}, case)


MUTATE_CASES = [*MUTATE, *rate("mutation_rate"), *SEED, *BACKEND]


@pytest.mark.parametrize("case", MUTATE_CASES, ids=ids(MUTATE_CASES))
def test_mutate(case: Case, backend: str, device: torch.device) -> None:
    good: Options = {
        "positive": torch.ones(2, 4, device=device),
        "negative": torch.ones(2, 3, 4, device=device),
        "mutation_rate": 0.5,
        "backend": backend,
    }
    if case[0] == "row_offset" and case[1](good) == 2**32 - 5:
        case = (case[0], always(2**32 - 1), case[2], str(2**32 - 1))  # for 2 rows
    check(emu_mutate, good, case)


ULS_CASES = [*ULS, *coefficient("beta"), *REDUCTION]


@pytest.mark.parametrize("case", ULS_CASES, ids=ids(ULS_CASES))
def test_uls(case: Case) -> None:
    good = {"positive_score": torch.ones(2), "negative_score": torch.ones(2, 3), "beta": 0.3}
    check(uls_cross_entropy, good, case)


MODULE_CASES = [*rate("mutation_rate"), *coefficient("beta"), *REDUCTION, *BACKEND]


@pytest.mark.parametrize("case", MODULE_CASES, ids=ids(MODULE_CASES))
def test_module(case: Case, backend: str, device: torch.device) -> None:
    """At the constructor or at the first call."""
    skip_if_only_the_kernels_read_it(case, backend, device)
    inputs = make(device=device)

    def build_and_call(**options: Any) -> Tensor:
        loss: Tensor = EMULoss(**options)(*inputs)
        return loss

    good = {"mutation_rate": 0.5, "beta": 0.3, "alpha": 0.2, "backend": backend}
    check(build_and_call, good, case)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8], ids=str)
def test_ids_out_of_range_in_every_dtype(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    good = batch(device) | LOSS | {"backend": backend}
    good |= {name: good[name].to(dtype) for name in ("positive", "negative")}
    for case in TENSORS:
        if case[2] is IndexError and "got 9" in case[3]:
            check(fused_emu_loss, good, case)


def test_ids_are_checked_before_gradients_are_asked_for(backend: str, device: torch.device) -> None:
    good = batch(device)
    good["query"].requires_grad_()
    good["table"].requires_grad_()
    bad = good | {"negative": with_id("negative", 9)(good)}
    for sparse in (False, True):
        with pytest.raises(IndexError, match="negative"):
            fused_emu_loss(**bad, **LOSS, backend=backend, sparse_grad=sparse)
        with pytest.raises(IndexError, match="negative"):
            fused_softmax_loss(**bad, backend=backend, sparse_grad=sparse)
        with pytest.raises(IndexError, match="negative"):
            emu_scores(**bad, mutation_rate=0.5, backend=backend, sparse_grad=sparse)
