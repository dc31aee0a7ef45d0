"""Defines the private operators. Their schemas follow from requests' fields and annotations.

Our code names all arguments. A request is passed as its fields, its mutation as the name and the
parameters of the rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from emu_kernels.mutation import RULES, Mutation
from emu_kernels.request import Draws, LossRequest, Request

_LIBRARY = torch.library.Library("emu_kernels", "DEF")
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float | Tensor | None: "Tensor?",  # numbers have been made tensors
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}

_PARAMETERS = {rule.name: tuple(f.name for f in fields(rule)) for rule in RULES.values()}
_DEFAULTS = {f.name: f.default for rule in RULES.values() for f in fields(rule)}
_FIELDS = {cls: tuple(f.name for f in fields(cls)) for cls in (Draws, Request, LossRequest)}

Values = dict[str, Any]
AnyDraws = TypeVar("AnyDraws", bound=Draws)


def flatten(request: Draws) -> Values:
    """A request as an operator's arguments, by name."""
    rule: Mutation = request.mutation
    values = {name: getattr(request, name) for name in _FIELDS[type(request)]}
    values |= {**_DEFAULTS, "mutation": rule.name}
    for name in _PARAMETERS[rule.name]:
        values[name] = getattr(rule, name)
    return values


def build(cls: type[AnyDraws], values: Values) -> AnyDraws:
    """The inverse of :func:`flatten`; other names among the values are ignored."""
    name = values["mutation"]
    parameters = {p: values[p] for p in _PARAMETERS[name]}
    given = {field: values[field] for field in _FIELDS[cls]}
    given["mutation"] = RULES[name](**parameters)
    request = object.__new__(cls)
    vars(request).update(given)  # faster than the frozen class's __init__
    return request


def differentiable(cls: type[Draws]) -> tuple[str, ...]:
    """The fields, and the parameters of rules, that get a gradient."""
    both = (*fields(cls), *(f for rule in RULES.values() for f in fields(rule)))
    return tuple(f.name for f in both if f.metadata.get("differentiable"))


def arguments(cls: type[Draws]) -> str:
    """The arguments in a schema: a request's fields, then the parameters of all mutation rules."""
    hints = get_type_hints(cls) | {"mutation": str}
    for rule in RULES.values():
        hints |= get_type_hints(rule)
    return ", ".join(f"{_TYPES[hints[name]]} {name}" for name in (*_FIELDS[cls], *_DEFAULTS))


def no_second_derivative(name: str) -> RuntimeError:
    """The error to raise when a gradient is differentiated."""
    return RuntimeError(
        f"{name} has no second derivative: its gradient was asked to be differentiated "
        "(create_graph=True). backend='reference' has one, except for one_vs_all_loss."
    )


class Function(torch.autograd.Function):
    """``forward`` is separate from ``setup_context``, as :mod:`torch.func` requires: it returns
    all that the backward pass needs of it."""

    def __init_subclass__(cls) -> None:
        # PyTorch inspects forward's signature at each call, which takes 20 µs if it is not stored.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Saves nothing unless overridden."""


class FirstOrder(Function):
    """A gradient that cannot be differentiated again."""

    what: ClassVar[str]
    """The function whose gradient it is."""

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        raise no_second_derivative(cls.what)


def tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


def define(
    name: str,
    schema: str,
    run: Callable[[Values], Any],
    fake: Callable[[Values], Any],
) -> Callable[[Values], Any]:
    """Define an operator by its implementation and its fake kernel; return a function to call it.

    All three functions take the arguments as one dictionary. PyTorch is given them by position,
    which is faster: only this function translates between the two.
    """
    _LIBRARY.define(f"{name}({schema}", tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.emu_kernels, name).default
    names = tuple(argument.name for argument in operator._schema.arguments)

    def named(function: Callable[[Values], Any]) -> Callable[..., Any]:
        return lambda *given: function(dict(zip(names, given, strict=True)))

    def call(values: Values) -> Any:
        return operator(*[values[name] for name in names])

    _LIBRARY.impl(name, named(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"emu_kernels::{name}", named(fake), lib=_LIBRARY)
    return call


def refuse_forward_mode(
    *inputs: Tensor | None,
    instead: str = "only backend='reference' has it; the others have backward mode",
) -> None:
    """Raise NotImplementedError if an input carries a tangent, which the operators would drop."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise NotImplementedError(
            f"forward-mode differentiation (torch.func.jvp, forward_ad): {instead}"
        )
