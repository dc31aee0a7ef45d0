"""Which implementations exist, which can run here, and which one a call gets.

``reference`` is the specification itself; the others have kernels. A new backend is a module here
that implements :class:`emu_kernels.backends.base.Kernels`, and an entry in ``_BACKENDS``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

from emu_kernels import ops
from emu_kernels.backends.base import Backend, Kernels
from emu_kernels.backends.cpu import CpuBackend
from emu_kernels.backends.cuda import CudaBackend
from emu_kernels.backends.reference import ReferenceBackend
from emu_kernels.backends.triton import TritonBackend

P = ParamSpec("P")
R = TypeVar("R")

# Fastest first. That cuda is faster than triton is only expected until both are `measured`.
_BACKENDS: tuple[Backend, ...] = (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())
_BY_NAME: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Let calls find a backend by its name; it replaces another of the same name."""
    _BY_NAME[backend.name] = backend
    if isinstance(backend, Kernels):
        ops.register(backend)


for _backend in _BACKENDS:
    register(_backend)
REFERENCE = ReferenceBackend.name
NAMES = (REFERENCE, *(name for name in _BY_NAME if name != REFERENCE))


def get(name: str) -> Backend:
    """The backend of that name."""
    return _BY_NAME[name]


def default_backend(device: torch.device | str, having: Sequence[str] = NAMES) -> str:
    """The backend that ``backend=None`` stands for on tensors of ``device``, among ``having``, the
    backends that implement the function.

    Warns once if it is not :attr:`~emu_kernels.backends.base.Kernels.measured`. GPU kernels that
    are emulated on the CPU, for tests, are never the default.
    """
    return _default(torch.device(device).type, tuple(having))


def _constant(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile call the function when tracing, rather than trace it: it asks the driver.

    Like ``torch.compiler.assume_constant_result``, but without importing the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _default(device_type: str, having: tuple[str, ...]) -> str:
    if device_type == "cpu":
        reason = _unavailable("cpu")
        if reason is None:
            return "cpu"
        _warn_of_reference(reason)
        return REFERENCE
    taking = [b.name for b in _BACKENDS if b.name in having and _takes(get(b.name), device_type)]
    name, *others = [name for name in taking if _unavailable(name) is None]
    if not get(name).measured:
        _warn_of_unmeasured(name, tuple(others))
    return name


@_constant
def _unavailable(name: str) -> str | None:
    return get(name).unavailable()


def _takes(backend: Backend, device_type: str) -> bool:
    return not backend.device_types or device_type in backend.device_types


@functools.cache
def _warn_of_reference(reason: str) -> None:
    """Warn once: the results are right, but take far longer than they need to."""
    warnings.warn(
        f"emu_kernels runs its plain PyTorch specification, which is slow: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _warn_of_unmeasured(name: str, others: tuple[str, ...]) -> None:
    """Warn once: these kernels have not been run on the hardware that they are for."""
    choices = " or ".join(f"backend={other!r}" for other in others)
    warnings.warn(
        f"emu_kernels uses its backend {name!r}, which is tested on emulated hardware only: its "
        f"results and its speed on a GPU are not known yet. {choices} chooses another, and "
        f"backend={name!r} this one without a warning; `make gpu-check` tests and measures them "
        "all on this machine",
        RuntimeWarning,
        stacklevel=2,
    )


def resolve(name: str | None, device: torch.device, having: Sequence[str] = NAMES) -> Backend:
    """The backend that the ``backend`` argument of a call means, among ``having``, the backends
    that implement the function.

    Raises:
        ValueError: unknown name, or a backend without this function or not for ``device``.
        RuntimeError: a backend that cannot run here; the message says why.
    """
    if name is None:
        return get(default_backend(device, having))
    if name not in having:
        raise ValueError(
            f"backend: expected None or one of {', '.join(map(repr, having))}, got {name!r}"
        )
    backend = _BY_NAME[name]
    reason = _unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend: {name!r} cannot run here: {reason}")
    if not _takes(backend, device.type):
        raise ValueError(
            f"backend: {name!r} runs on tensors on {' or '.join(backend.device_types)}, "
            f"got tensors on {device}"
        )
    return backend


def describe() -> list[tuple[str, str | None]]:
    """Every backend's name, with the reason why it cannot run here, or None if it can."""
    return [(name, get(name).unavailable()) for name in NAMES]
