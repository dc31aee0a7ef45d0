"""Names as bytes, and how they are found."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from emu_kernels.trainer.names import Names, UnknownNameError, encode, find, visible

NAMES = sorted(["ab", "a", "c d", "Zürich", "東京", "é", "z", "𝕏"])


def test_names_come_back():
    names = Names(encode(NAMES))
    assert len(names) == 8
    assert list(names) == NAMES
    assert names[-1] == NAMES[-1]
    assert names[1:-2] == NAMES[1:-2]
    with pytest.raises(IndexError):
        names[8]
    assert list(Names(encode(["one"]))) == ["one"]


@pytest.mark.parametrize("names", [NAMES, [*reversed(NAMES)]], ids=["sorted", "not sorted"])
def test_every_name_is_found(names):
    stored = Names(encode(names))
    assert [find("entity", name, stored) for name in names] == list(range(8))
    for name in ("", "a\nab", "b", "zz"):
        with pytest.raises(UnknownNameError, match="holds no entity"):
            find("entity", name, stored)


def test_similar_names_are_suggested():
    with pytest.raises(UnknownNameError, match="no relation 'Zurich'; did you mean Zürich"):
        find("relation", "Zurich", Names(encode(NAMES)))


def test_names_with_blanks_are_quoted_for_people():
    assert [visible(x) for x in ("a b", " a", "a\x1b[31m", 3)] == ["a b", "' a'", r"'a\x1b[31m'", 3]
    with pytest.raises(UnknownNameError, match="no entity 'lead'; did you mean ' lead'"):
        find("entity", "lead", Names(encode([" lead"])))


def test_a_name_is_found_without_decoding_the_others(monkeypatch):
    names = Names(encode(f"e{i:06}" for i in range(100_000)))
    get = Mock(side_effect=names.__getitem__)
    monkeypatch.setattr(Names, "__getitem__", get)
    assert find("entity", "e012345", names) == 12_345
    assert get.call_count < 20
