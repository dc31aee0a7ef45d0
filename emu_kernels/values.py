"""Checks that read the values of tensors, and their operators.

They run when a call runs, not when it is traced. On a GPU they would wait for the device: there ids
are checked by the kernels (:mod:`emu_kernels.backends.ids`), and a rate or a coefficient out of
range makes the loss NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emu_kernels.library import Function, Values, define
from emu_kernels.mask import rates_to_thresholds
from emu_kernels.request import LossRequest
from emu_kernels.validate import coefficient


def check_ids(name: str, ids: Tensor, *, rows: int, lowest: int) -> None:
    """Raise IndexError unless ``lowest <= id < rows`` for every id. Synchronises a GPU."""
    if ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low >= lowest and high < rows:
        return
    where = ((ids < lowest) | (ids >= rows)).flatten().nonzero()[0]
    raise bad_id(name, ids, int(where), rows=rows, lowest=lowest)


def bad_id(name: str, ids: Tensor, flat: int, *, rows: int, lowest: int) -> IndexError:
    """The error for the id at index ``flat`` of the flattened ``ids``."""
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ids.shape))
    padding = " (-1 is padding)" if lowest < 0 else ""
    return IndexError(
        f"{name}: expected ids from {lowest} to {rows - 1}{padding}, "
        f"got {int(ids[at])} at index {at if len(at) > 1 else at[0]}"
    )


def check_rates(name: str, rates: Tensor) -> None:
    """Raise ValueError unless every rate is in [0, 1]. Synchronises a GPU."""
    bad = ((rates < 0) | (rates > 1) | rates.isnan()).nonzero()
    if len(bad):
        at = tuple(bad[0].tolist())
        place = f"component {at[0]}" if len(at) == 1 else f"index {at}"
        raise ValueError(f"{name}: expected rates in [0, 1], got {float(rates[at])} at {place}")


def _checked(name: str, rest: str, check: Callable[[Values], object]) -> Callable[[Values], Any]:
    """An operator that checks the values of a tensor, ``value``, and returns a copy of it."""

    def run(values: Values) -> Tensor:
        check(values)
        copy: Tensor = values["value"].clone()
        return copy

    schema = f"Tensor value, {rest}str name) -> Tensor"
    return define(name, schema, run, lambda values: torch.empty_like(values["value"]))


_IDS = _checked(
    "checked_ids",
    "SymInt rows, SymInt lowest, ",
    lambda x: check_ids(x["name"], x["value"], rows=x["rows"], lowest=x["lowest"]),
)
_COEFFICIENT = _checked(
    "checked_coefficient", "", lambda x: coefficient(x["name"], x["value"].item())
)
_RATES = _checked("checked_rates", "", lambda x: check_rates(x["name"], x["value"]))


def _rates_to_thresholds(values: Values) -> Tensor:
    rates: Tensor = values["rates"]
    if rates.device.type == "cpu":
        check_rates(values["name"], rates)
    return rates_to_thresholds(rates)


_THRESHOLDS = define(
    "rates_to_thresholds",
    "Tensor rates, str name) -> Tensor",
    _rates_to_thresholds,
    lambda values: values["rates"].new_empty(values["rates"].shape, dtype=torch.int16),
)


def usable_thresholds(name: str, rates: Tensor) -> Tensor:
    """The thresholds of a tensor of rates, which are checked if they are on the CPU."""
    thresholds: Tensor = _THRESHOLDS({"rates": rates, "name": name})
    return thresholds


class _UsableRates(Function):
    @staticmethod
    def forward(name: str, rates: Tensor) -> Tensor:
        checked: Tensor = _RATES({"value": rates, "name": name})
        return checked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def usable_rates(name: str, rates: Tensor) -> Tensor:
    """Rates, checked and differentiable; on a GPU NaN where they are out of range."""
    if rates.device.type == "cpu":
        checked: Tensor = _UsableRates.apply(name, rates)
        return checked
    return torch.where((rates >= 0) & (rates <= 1), rates, float("nan"))


def usable_ids(
    positive: Tensor,  # (B,)
    negative: Tensor,  # (G, K)
    *,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids that are safe to index with; on a GPU also a (B,) factor, NaN for rows with bad ids."""
    if positive.device.type == "cpu":
        positive = _IDS({"value": positive, "rows": rows, "lowest": 0, "name": "positive"})
        negative = _IDS({"value": negative, "rows": rows, "lowest": -1, "name": "negative"})
        return positive, negative, None
    bad_positive = (positive < 0) | (positive >= rows)
    bad_negative = (negative < -1) | (negative >= rows)
    group_rows = positive.shape[0] // max(negative.shape[0], 1)
    bad = bad_positive | bad_negative.any(dim=1).repeat_interleave(group_rows, dim=0)
    poison = torch.where(bad, float("nan"), 1.0).float()
    return positive.masked_fill(bad_positive, 0), negative.masked_fill(bad_negative, 0), poison


def usable_coefficients(request: LossRequest) -> tuple[float | Tensor, float | Tensor]:
    """β and α of a request, checked."""
    if request.coefficients is None:
        return request.beta, request.alpha
    beta, alpha = request.coefficients.unbind()
    return usable_coefficient("beta", beta), usable_coefficient("alpha", alpha)


def usable_coefficient(name: str, value: Tensor) -> Tensor:
    """A coefficient, checked; on a GPU NaN if it is out of range."""
    if value.device.type == "cpu":
        checked: Tensor = _COEFFICIENT({"value": value, "name": name})
        return checked
    return torch.where((value >= 0) & value.isfinite(), value, float("nan"))
