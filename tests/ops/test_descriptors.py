"""Python, C++ and Triton have the same similarities and mutation rules, with the same traits."""

from __future__ import annotations

import dataclasses

import pytest

from emu_kernels import _C, backends, reference
from emu_kernels.mutation import RULES
from emu_kernels.similarity import SIMILARITIES


def test_similarities_of_the_specification() -> None:
    assert reference.TERMS.keys() == SIMILARITIES.keys()


def test_similarities_of_cpp() -> None:
    described = [dataclasses.asdict(similarity) for similarity in SIMILARITIES.values()]
    assert sorted(_C.similarities(), key=str) == sorted(described, key=str)


def test_mutation_rules_of_the_specification() -> None:
    in_closed_form = {name for name, rule in RULES.items() if rule.draw == "moments"}
    assert reference.MUTATE.keys() | in_closed_form == RULES.keys()


def test_mutation_rules_of_cpp() -> None:
    described = [{"name": r.name, "draw": r.draw, "pairs": r.pairs} for r in RULES.values()]
    assert sorted(_C.mutations(), key=str) == sorted(described, key=str)


def test_triton_has_them_all() -> None:
    reason = backends.get("triton").unavailable()
    if reason is not None:
        pytest.skip(reason)
    from emu_kernels.triton import masks, similarities

    assert similarities.TERMS.keys() == SIMILARITIES.keys()
    assert masks.SHARES.keys() == {name for name, rule in RULES.items() if rule.draw == "share"}
