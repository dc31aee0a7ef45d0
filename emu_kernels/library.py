"""The private operators' definitions. Their schemas are read off requests and annotations.

All arguments go by name. A request travels as its fields; its mutation as the rule's name and the
rule's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from emu_kernels.mutation import RULES, Mutation
from emu_kernels.request import Draws, LossRequest, Request

OPS = torch.ops.emu_kernels
_LIBRARY = torch.library.Library("emu_kernels", "DEF")
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}

_PARAMETERS = {rule.name: tuple(f.name for f in fields(rule)) for rule in RULES.values()}
_FIELDS = {cls: tuple(f.name for f in fields(cls)) for cls in (Draws, Request, LossRequest)}

AnyDraws = TypeVar("AnyDraws", bound=Draws)


def flatten(request: Draws) -> dict[str, Any]:
    """An operator's arguments by name."""
    values = {name: getattr(request, name) for name in _FIELDS[type(request)]}
    rule: Mutation = request.mutation
    values["mutation"] = rule.name
    for name in _PARAMETERS[rule.name]:
        values[name] = getattr(rule, name)
    return values


def build(cls: type[AnyDraws], values: Mapping[str, Any]) -> AnyDraws:
    """The inverse of :func:`flatten`; names that are not ``cls``'s are ignored."""
    name = values["mutation"]
    # PyTorch leaves out arguments that equal the schema's default, which is the rule's own.
    parameters = {p: values[p] for p in _PARAMETERS[name] if p in values}
    rest = {field: values[field] for field in _FIELDS[cls] if field != "mutation"}
    return cls(mutation=RULES[name](**parameters), **rest)


def part(cls: type[Draws], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a flattened request's values that are fields of the wider class ``cls``."""
    names = (*_FIELDS[cls], *_PARAMETERS[values["mutation"]])
    return {name: values[name] for name in names}


def differentiable(cls: type[Draws]) -> tuple[str, ...]:
    """The fields that get a gradient."""
    return tuple(f.name for f in fields(cls) if f.metadata.get("differentiable"))


def arguments(cls: type[Draws]) -> str:
    """A request's fields in a schema, its mutation's parameters last, with their defaults."""
    hints = get_type_hints(cls) | {"mutation": str}
    listed = [f"{_TYPES[hints[name]]} {name}" for name in _FIELDS[cls]]
    parameters: dict[str, str] = {}
    for rule in RULES.values():
        hints = get_type_hints(rule)
        for f in fields(rule):
            parameters[f.name] = f"{_TYPES[hints[f.name]]} {f.name}={_default(f)}"
    return ", ".join([*listed, *parameters.values()])


def _default(parameter: Field[Any]) -> Any:
    assert parameter.default is not MISSING, f"{parameter.name}: a rule's parameter has a default"
    return parameter.default


def tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator ``name`` of keyword arguments, with its implementation and its fake kernel."""
    _LIBRARY.define(f"{name}(*, {schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emu_kernels::{name}", fake, lib=_LIBRARY)
