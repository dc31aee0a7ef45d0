"""Checks of the public arguments, once for every backend, before any kernel runs.

Each message names the argument, the rule, and the value that broke it. Checks that read the values
of tensors are in :mod:`emu_kernels.values`: they run inside operators, so that tracing works.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy
import torch
from torch import Tensor

from emu_kernels.mutation import MASK_UNITS, RULES, Mutation
from emu_kernels.similarity import SIMILARITIES

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("none", "sum", "mean")
MAX_COUNTER = 2**32
MAX_SEED = 2**63


def one_of(name: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        listed = ", ".join(repr(v) for v in valid)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def any_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        hint = "; pass its weight" if isinstance(value, torch.nn.Embedding) else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}{hint}")
    return value


def tensor(name: str, value: object) -> Tensor:
    """A tensor that operators take: dense, and not one that torch.vmap made."""
    value = any_tensor(name, value)
    if not torch.compiler.is_compiling() and _under_vmap(value):
        raise RuntimeError(
            f"{name}: torch.vmap is not supported; the rows of a batch are independent already, "
            'and reduction="none" gives the loss of each'
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    return value


def _under_vmap(value: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def dims(name: str, value: Tensor, allowed: tuple[int, ...], shape: str) -> None:
    if value.ndim not in allowed:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")


def floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}"
        )


def integer(name: str, value: Tensor) -> None:
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype (row ids), got {value.dtype}")


def same_device(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != reference.device:
            raise ValueError(
                f"{name}: expected to be on {reference.device} like {reference_name}, "
                f"got {other.device}"
            )


def same_precision(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if (value.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(
            f"{name}: float64 does not mix with other dtypes; {name} is {value.dtype}, "
            f"{other_name} is {other.dtype}"
        )


def batch(
    query: object,
    table: object,
    positive: object,
    negative: object,
    *,
    similarity: object,
    scale: object,
    similarity_weights: object,
    phase_scale: object,
) -> None:
    """Shapes, dtypes and devices of what every fused function takes."""
    one_of("similarity", similarity, tuple(SIMILARITIES))
    query, table = tensor("query", query), tensor("table", table)
    positive, negative = tensor("positive", positive), tensor("negative", negative)
    dims("query", query, (2,), "(B, D)")
    dims("table", table, (2,), "(N, D)")
    dims("positive", positive, (1,), "(B,)")
    dims("negative", negative, (1, 2), "(K,) or (G, K), row ids of table")
    floating("query", query)
    floating("table", table)
    integer("positive", positive)
    integer("negative", negative)
    same_precision("query", query, "table", table)
    same_device("table", table, query=query, positive=positive, negative=negative)
    rows, dim = query.shape
    if dim == 0:
        raise ValueError(f"query: expected at least one component, got shape {tuple(query.shape)}")
    if table.shape[1] != dim:
        raise ValueError(
            f"table: expected {dim} components per row like query, got shape {tuple(table.shape)}"
        )
    if positive.shape[0] != rows:
        raise ValueError(
            f"positive: expected {rows} ids, one for each row of query, "
            f"got shape {tuple(positive.shape)}"
        )
    groups = 1 if negative.ndim == 1 else negative.shape[0]
    if rows % groups if groups else rows:
        raise ValueError(
            f"negative: expected (G, K) with G dividing the batch size {rows}, "
            f"got shape {tuple(negative.shape)}"
        )
    assert isinstance(similarity, str)
    _similarity_options(similarity, query, scale, similarity_weights, phase_scale)


def _similarity_options(
    name: str, query: Tensor, scale: object, weights: object, phase_scale: object
) -> None:
    takes = SIMILARITIES[name]
    rows, dim = query.shape
    if dim % takes.halves:
        raise ValueError(
            f"query: similarity {name!r} needs an even number of components, got {dim}"
        )
    shapes = (
        ("scale", scale, (rows, dim // takes.halves * takes.scaled_halves), "(B, {1})"),
        ("similarity_weights", weights, (takes.weights,), "({0},)"),
    )
    for argument, value, shape, text in shapes:
        if value is None:
            continue
        if not shape[-1]:
            raise ValueError(f"{argument}: similarity {name!r} takes none, expected None")
        value = tensor(argument, value)
        floating(argument, value)
        same_precision(argument, value, "query", query)
        same_device("query", query, **{argument: value})
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{argument}: similarity {name!r} expects shape {text.format(*shape)}"
                f"{f' with B = {rows}' if len(shape) > 1 else ''}, got {tuple(value.shape)}"
            )
    kappa = finite("phase_scale", phase_scale)
    if kappa != 1 and not takes.phases:
        raise ValueError(f"phase_scale: similarity {name!r} takes none, expected 1")


def sample_weight(value: object, query: Tensor) -> None:
    if value is None:
        return
    weight = tensor("sample_weight", value)
    dims("sample_weight", weight, (1,), "(B,)")
    if weight.shape[0] != query.shape[0]:
        raise ValueError(
            f"sample_weight: expected {query.shape[0]} weights, one for each row of query, "
            f"got shape {tuple(weight.shape)}"
        )
    floating("sample_weight", weight)
    same_device("query", query, sample_weight=weight)


def log_q(value: object, table: Tensor) -> None:
    if value is None:
        return
    given = tensor("log_q", value)
    floating("log_q", given)
    if tuple(given.shape) != (table.shape[0],):
        raise ValueError(
            f"log_q: expected shape ({table.shape[0]},), a number for each row of table, "
            f"got {tuple(given.shape)}"
        )
    same_device("table", table, log_q=given)
    if given.requires_grad:
        raise ValueError("log_q: is not differentiated; pass log_q.detach()")


def number(name: str, value: object, expected: str = "a number") -> float:
    """A Python or NumPy number, as a Python float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    return float(value)


def whole(name: str, value: object, expected: str = "an int") -> int:
    """An integer of Python, NumPy or torch, as a Python int, or a symbolic integer as it is."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype in INTEGERS:
        value = value.item()
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    return int(value)


def at_least(least: int, name: str, value: object) -> int:
    given = whole(name, value)
    if given < least:
        raise ValueError(f"{name}: expected at least {least}, got {given}")
    return given


def finite(name: str, value: object) -> float:
    given = number(name, value)
    if not -math.inf < given < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return given


def flag(name: str, value: object) -> bool:
    if not isinstance(value, (bool, numpy.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def rate(name: str, value: object) -> float:
    given = number(name, value, "a number in [0, 1]")
    if not 0 <= given <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return given


def rate_or_rule(name: str, value: object) -> None:
    """Check a mutation rate as far as possible without the tensors that it has to fit."""
    if not isinstance(value, (Tensor, Mutation)):
        rate(name, value)


def coefficient(name: str, value: object) -> float | Tensor:
    """A loss coefficient: a finite number >= 0, or a one-element tensor, which is not read here."""
    if isinstance(value, Tensor):
        tensor(name, value)
        if value.numel() != 1 or not value.dtype.is_floating_point:
            raise ValueError(
                f"{name}: expected a number or a one-element floating-point tensor, "
                f"got shape {tuple(value.shape)}, dtype {value.dtype}"
            )
        if value.requires_grad:
            raise ValueError(f"{name}: is not differentiated; pass {name}.detach()")
        return value
    given = number(name, value, "a number >= 0")
    if not 0 <= given < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return given


def seed(value: object, device: torch.device) -> int | Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        tensor("seed", value)
        if value.numel() != 1 or value.dtype != torch.int64:
            raise ValueError(
                "seed: expected an int or a one-element int64 tensor, "
                f"got shape {tuple(value.shape)}, dtype {value.dtype}"
            )
        if value.device != device:
            raise ValueError(f"seed: expected to be on {device} like table, got {value.device}")
        return value
    given = whole("seed", value, "an int, a tensor or None")
    if not 0 <= given < MAX_SEED:
        raise ValueError(f"seed: expected 0 <= seed < 2**63, got {value}")
    return given


def row_offset(value: object, rows: int) -> int:
    given = whole("row_offset", value)
    if given < 0 or given + rows > MAX_COUNTER:
        raise ValueError(f"row_offset: expected 0 <= row_offset <= 2**32 - {rows}, got {value}")
    return given


def mask_unit(value: object, dim: int | torch.SymInt) -> None:
    one_of("mask_unit", value, MASK_UNITS)
    if RULES[str(value)].pairs and dim % 2:
        raise ValueError(f"mask_unit: {value!r} needs an even number of components, got {dim}")


def rates(name: str, value: Tensor, unit: str, units: int, device: torch.device) -> None:
    """A tensor of mutation rates: one, or one for each of the mask's units."""
    tensor(name, value)
    if tuple(value.shape) not in ((), (units,)) or not value.dtype.is_floating_point:
        raise ValueError(
            f"{name}: expected a number, a Mixup, an Expected or a floating-point tensor of shape "
            f"() or ({units},), one rate per {unit}, got shape {tuple(value.shape)}, "
            f"dtype {value.dtype}"
        )
    if value.requires_grad:
        raise ValueError(f"{name}: is not differentiated; pass {name}.detach()")
    if value.device != device:
        raise ValueError(f"{name}: expected to be on {device} like table, got {value.device}")


def expected(
    name: str, value: object, unit: str, shapes: tuple[tuple[int, ...], ...], query: Tensor
) -> float | Tensor:
    """The rate or rates of EMU in closed form."""
    if not isinstance(value, Tensor):
        return rate(name, value)
    tensor(name, value)
    floating(name, value)
    same_precision(name, value, "query", query)
    same_device("query", query, **{name: value})
    if tuple(value.shape) not in shapes:
        listed = " or ".join(map(str, shapes))
        raise ValueError(
            f"{name}: expected a number or a tensor of one rate per {unit}, of shape {listed}, "
            f"got {tuple(value.shape)}"
        )
    return value


def known(value: object, positive: Tensor, device: torch.device) -> None:
    """None, or lists of ids in CSR form: offsets (B + 1,) and ids (M,)."""
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"known: expected (offsets, ids) or None, got {type(value).__name__}")
    offsets, ids = tensor("known", value[0]), tensor("known", value[1])
    for part in (offsets, ids):
        dims("known", part, (1,), "(B + 1,) and (M,)")
        integer("known", part)
        if part.device != device:
            raise ValueError(f"known: expected to be on {device} like table, got {part.device}")
    rows = positive.shape[0]
    offsets = offsets.to(torch.int64)  # unsigned ones have no negative differences
    if offsets.shape[0] != rows + 1:
        raise ValueError(f"known: expected {rows + 1} offsets, got {offsets.shape[0]}")
    if offsets[0] != 0 or offsets[-1] != ids.shape[0] or bool((offsets.diff() < 0).any()):
        raise ValueError(f"known: expected offsets that rise from 0 to {ids.shape[0]}")


def embeddings(positive: object, negative: object) -> None:
    """(B, D) and (B, K, D), as ``emu_mutate`` takes them."""
    positive, negative = tensor("positive", positive), tensor("negative", negative)
    dims("positive", positive, (2,), "(B, D)")
    dims("negative", negative, (3,), "(B, K, D)")
    floating("positive", positive)
    floating("negative", negative)
    same_device("positive", positive, negative=negative)
    rows, dim = positive.shape
    if negative.dtype != positive.dtype:
        raise TypeError(f"negative: expected {positive.dtype} like positive, got {negative.dtype}")
    if negative.shape[0] != rows or negative.shape[2] != dim:
        raise ValueError(
            f"negative: expected shape ({rows}, K, {dim}) to go with positive, "
            f"got {tuple(negative.shape)}"
        )


def scores(positive_score: object, negative_score: object, cumulant: object) -> None:
    """(B,), (B, K) and None or (B, K), as ``uls_cross_entropy`` takes them."""
    positive = tensor("positive_score", positive_score)
    dims("positive_score", positive, (1,), "(B,)")
    floating("positive_score", positive)
    negative = _negative_scores("negative_score", negative_score, positive)
    if cumulant is None:
        return
    given = _negative_scores("cumulant", cumulant, positive)
    if given.shape != negative.shape:
        raise ValueError(
            f"cumulant: expected shape {tuple(negative.shape)} like negative_score, "
            f"got {tuple(given.shape)}"
        )


def _negative_scores(name: str, value: object, positive: Tensor) -> Tensor:
    negative = tensor(name, value)
    dims(name, negative, (2,), "(B, K)")
    floating(name, negative)
    same_precision("positive_score", positive, name, negative)
    same_device("positive_score", positive, **{name: negative})
    if negative.shape[0] != positive.shape[0]:
        raise ValueError(
            f"{name}: expected {positive.shape[0]} rows like positive_score, "
            f"got shape {tuple(negative.shape)}"
        )
    return negative
