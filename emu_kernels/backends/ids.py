"""Ids out of range on a GPU, where a check before the launch would wait for the device.

There the kernels check every id themselves. For one out of range they access no memory outside the
table, make the row's loss NaN, and store the id in a pinned word on the host, which the next call
reads without waiting. With EMU_KERNELS_CHECK=1 in the environment every call checks at once.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from emu_kernels.values import check_ids

POSITIVE, NEGATIVE = 0, 1
_ARGUMENTS = ("positive", "negative")  # in the order of their words


@functools.cache
def report(device: torch.device) -> Tensor:
    """(2,) int64 on the host, in memory that kernels on ``device`` can write: an id of ``positive``
    and one of ``negative`` that were out of range, 0 for none (0 is out of range in an empty table
    only, which :func:`check` refuses)."""
    return torch.zeros(2, dtype=torch.int64, pin_memory=device.type != "cpu")


@functools.cache
def _words(device: torch.device) -> Any:
    """The same memory as a NumPy array, which is cheap to read."""
    return report(device).numpy()


def raise_reported(device: torch.device) -> None:
    """Raise IndexError for an id that a kernel has reported since the last time."""
    words = _words(device)
    for place, name in enumerate(_ARGUMENTS):
        found = int(words[place])
        if found:
            words[:] = 0
            raise IndexError(
                f"{name}: an earlier call on {device} was given an id out of its table's range: "
                f"got {found}; its row's loss is NaN (EMU_KERNELS_CHECK=1 in the environment makes "
                "the call itself raise)"
            )


def check(name: str, ids: Tensor, *, rows: int, lowest: int) -> None:
    """:meth:`Kernels.check_ids` of a GPU backend.

    Raises:
        IndexError: an id of an earlier call was out of range, or with EMU_KERNELS_CHECK=1 one of
            this call's is, or the table has no rows that a positive's id could name.
    """
    raise_reported(ids.device)
    if rows == 0 and lowest == 0 and ids.numel():
        raise IndexError(f"{name}: the table has no rows, got {ids.numel()} ids")
    if os.environ.get("EMU_KERNELS_CHECK") == "1":
        check_ids(name, ids, rows=rows, lowest=lowest)
