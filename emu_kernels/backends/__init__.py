"""Which implementations exist, which can run here, and which one a call gets.

``reference`` is the specification itself (:mod:`emu_kernels.reference`); the kernel backends
implement :class:`emu_kernels.backends.base.Backend`. A new one is a module here and an entry in
``_KERNELS``.
"""

from __future__ import annotations

import functools
import warnings

import torch

from emu_kernels.backends.base import Backend
from emu_kernels.backends.cpu import CpuBackend
from emu_kernels.backends.cuda import CudaBackend
from emu_kernels.backends.triton import TritonBackend

REFERENCE = "reference"
# Fastest first. That cuda comes before triton is an expectation: no GPU has timed them yet.
_KERNELS: tuple[Backend, ...] = (CudaBackend(), TritonBackend(), CpuBackend())
_BY_NAME = {backend.name: backend for backend in _KERNELS}
NAMES = (REFERENCE, *_BY_NAME)


def get(name: str) -> Backend:
    """The kernel backend of that name (not ``reference``, which has no kernels)."""
    return _BY_NAME[name]


def default_backend(device: torch.device | str) -> str:
    """The name that ``backend=None`` stands for on tensors of ``device``.

    A GPU's kernels that are emulated on the CPU, for tests, are never it.
    """
    device = torch.device(device)
    for backend in _KERNELS:
        if device.type == "cpu" and backend.name != "cpu":
            continue
        if device.type in backend.device_types and backend.unavailable() is None:
            return backend.name
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _warn_of_reference(get("cpu").unavailable())
    return REFERENCE


@functools.cache
def _warn_of_reference(reason: str | None) -> None:
    """Once: the answers are right, and take far longer than they need."""
    warnings.warn(
        f"emu_kernels runs its plain PyTorch specification, which is slow: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def resolve(name: str | None, device: torch.device) -> str:
    """Check the ``backend`` argument of a call and return the backend's name.

    Raises:
        ValueError: unknown name, or a backend that has no kernels for ``device``.
        RuntimeError: a backend that cannot run here; the message says why.
    """
    if name is None:
        return default_backend(device)
    if name == REFERENCE:
        return name
    if name not in _BY_NAME:
        raise ValueError(
            f"backend: expected None or one of {', '.join(map(repr, NAMES))}, got {name!r}"
        )
    backend = _BY_NAME[name]
    reason = backend.unavailable()
    if reason is not None:
        raise RuntimeError(f"backend: {name!r} cannot run here: {reason}")
    if device.type not in backend.device_types:
        raise ValueError(
            f"backend: {name!r} runs on tensors on {' or '.join(backend.device_types)}, "
            f"got tensors on {device}"
        )
    return name


def describe() -> list[tuple[str, str | None]]:
    """Every backend's name, with the reason why it cannot run here or None where it can."""
    return [(REFERENCE, None), *((b.name, b.unavailable()) for b in _KERNELS)]
