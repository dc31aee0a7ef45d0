"""How users learn of ids that GPU kernels find out of range; the kernels have their own tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emu_kernels.backends import ids

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    ids.report(CPU).zero_()
    yield
    ids.report(CPU).zero_()


@pytest.mark.parametrize(
    ("place", "name"), [(ids.POSITIVE, "positive"), (ids.NEGATIVE, "negative")]
)
def test_a_reported_id_is_raised_once_by_the_next_call(place: int, name: str) -> None:
    good = torch.tensor([0, 3])
    ids.check("positive", good, rows=4, lowest=0)
    ids.report(CPU)[place] = -7
    with pytest.raises(IndexError, match=f"{name}.*earlier call on cpu.*got -7"):
        ids.check("positive", good, rows=4, lowest=0)
    ids.check("positive", good, rows=4, lowest=0)


def test_this_calls_ids_are_left_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = torch.tensor([0, 4])
    ids.check("positive", bad, rows=4, lowest=0)
    monkeypatch.setenv("EMU_KERNELS_CHECK", "1")
    with pytest.raises(IndexError, match="positive: expected ids from 0 to 3, got 4 at index 1"):
        ids.check("positive", bad, rows=4, lowest=0)


def test_an_empty_table_has_no_positives() -> None:
    ids.check("positive", torch.tensor([], dtype=torch.int64), rows=0, lowest=0)
    ids.check("negative", torch.tensor([-1]), rows=0, lowest=-1)
    with pytest.raises(IndexError, match="positive: the table has no rows, got 2 ids"):
        ids.check("positive", torch.tensor([0, 0]), rows=0, lowest=0)
