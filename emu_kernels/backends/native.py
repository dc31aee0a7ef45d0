"""What the backends of csrc share: a request as the keyword arguments of an extension module.

The modules know addresses and sizes, but no torch. Their arguments are named like the fields of
requests and results; the address 0 stands for no tensor.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emu_kernels._version import __version__
from emu_kernels.backends.base import (
    LossState,
    MutateGradient,
    Scores,
    ScoresGradient,
    ScoreWeights,
    new_loss_state,
    new_scores,
    new_scores_gradient,
)
from emu_kernels.ops import KernelBackend
from emu_kernels.request import Draws, LossRequest, Request


def load(name: str, absent: str | None = None) -> tuple[Any, str | None]:
    """The extension module ``emu_kernels.<name>``, or why it cannot be used: ``absent`` if it was
    never built."""
    try:
        module = importlib.import_module(f"emu_kernels.{name}")
    except ImportError as error:  # also of another platform's binary
        if absent is not None and isinstance(error, ModuleNotFoundError):
            return None, absent
        return None, f"the extension module emu_kernels.{name} cannot be imported ({error})"
    if module.version != __version__:
        return None, (
            f"the extension module was built for version {module.version}, this is {__version__}: "
            "build it again (pip install --editable .)"
        )
    return module, None


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's memory, 0 for None and for an empty tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def pointers(tensors: NamedTuple, *names: str) -> dict[str, int]:
    """The addresses of a tuple's tensors, or of those that are named, by name."""
    return {name: getattr(tensors, name).data_ptr() for name in names or tensors._fields}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if the components of a row are adjacent, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _draws(draws: Draws) -> dict[str, Any]:
    """A request's draws, with the rule's own parameters by their names."""
    rule = draws.mutation
    out = {"mutation": rule.name, "seed": draws.seed.data_ptr(), "row_offset": draws.row_offset}
    for name, value in vars(rule).items():
        is_tensor = value is None or isinstance(value, Tensor)
        out[name] = pointer(value) if is_tensor else value
        if isinstance(value, Tensor) and value.ndim > 1:
            out[f"{name}_rows"], out[f"{name}_units"] = value.shape
    return out


class NativeBackend(KernelBackend):
    """The operators that both modules have; subclasses add the gradient of the table."""

    def __init__(self, native: Any, missing: str | None) -> None:
        """Takes what :func:`load` returns."""
        self._native, self._missing = native, missing

    @abstractmethod
    def _place(self, device: torch.device) -> dict[str, int]:
        """Where a call runs: what csrc/common/problem.h calls a Place."""

    def _report(self, device: torch.device) -> int:
        """Address of the words for ids out of range; 0 unless the kernels check ids themselves."""
        return 0

    def _large(self, result: Tensor) -> Tensor:
        """A result that may be large and was just allocated, made ready to be written."""
        return result

    def _problem(self, request: Request) -> Any:
        table = _rows(request.table)
        return self._native.Problem(
            keep=(request, table),  # the owners of the addresses; `table` may be a copy
            query=pointer(request.query),
            table=pointer(table),
            scale=pointer(request.scale),
            weights=pointer(request.weights),
            positive=pointer(request.positive),
            negative=pointer(request.negative),
            report=self._report(table.device),
            dtype=_dtype(table),
            table_stride=table.stride(0),
            table_rows=table.shape[0],
            batch=request.query.shape[0],
            dim=request.query.shape[1],
            groups=request.negative.shape[0],
            count=request.negative.shape[1],
            similarity=request.similarity,
            phase_scale=request.phase_scale,
            draws=_draws(request),
            place=self._place(table.device),
        )

    def loss_forward(self, request: LossRequest, *, need_grad: bool) -> LossState:
        state = new_loss_state(request, need_grad=need_grad)
        problem = self._problem(request)
        workspace = memory(
            request.query, self._native.loss_workspace(problem=problem, need_grad=need_grad)
        )
        self._native.loss_forward(
            problem=problem,
            beta=request.beta,
            alpha=request.alpha,
            coefficients=pointer(request.coefficients),
            sample_weight=pointer(request.sample_weight),
            positive_log_q=pointer(request.positive_log_q),
            negative_log_q=pointer(request.negative_log_q),
            reduction=request.reduction,
            need_grad=need_grad,
            **pointers(state, "loss", "terms", "row_scale"),
            gradient=pointers(state, *ScoresGradient._fields),
            workspace=pointer(workspace),
        )
        return state

    def scores_forward(self, request: Request) -> Scores:
        scores = new_scores(request)
        self._native.scores_forward(problem=self._problem(request), **pointers(scores))
        return scores

    def query_gradient(self, request: Request, upstream: ScoreWeights) -> ScoresGradient:
        gradient = new_scores_gradient(request)
        problem = self._problem(request)
        workspace = memory(request.query, self._native.query_gradient_workspace(problem=problem))
        self._native.query_gradient(
            problem=problem,
            **pointers(upstream),
            gradient=pointers(gradient),
            workspace=pointer(workspace),
        )
        return gradient

    def mutate_forward(self, positive: Tensor, negative: Tensor, draws: Draws) -> Tensor:
        out = self._large(torch.empty_like(negative))
        self._native.mutate_forward(
            positive=pointer(positive),
            negative=pointer(negative),
            out=pointer(out),
            **self._mutated(negative, draws),
        )
        return out

    def mutate_backward(self, grad: Tensor, draws: Draws) -> MutateGradient:
        gradient = MutateGradient(
            grad_positive=grad.new_empty((grad.shape[0], grad.shape[2])),
            grad_negative=self._large(torch.empty_like(grad)),
        )
        self._native.mutate_backward(
            grad=pointer(grad), **pointers(gradient), **self._mutated(grad, draws)
        )
        return gradient

    def _mutated(self, negative: Tensor, draws: Draws) -> dict[str, Any]:
        batch, count, dim = negative.shape
        return {
            "dtype": _dtype(negative),
            "batch": batch,
            "count": count,
            "dim": dim,
            "draws": _draws(draws),
            "place": self._place(negative.device),
        }


def memory(like: Tensor, size: int) -> Tensor | None:
    """Workspace for the kernels, on a tensor's device; None for size 0."""
    return like.new_empty((size,), dtype=torch.uint8) if size else None
