"""The two plans of a dense table gradient on a GPU, forced, so that they can be compared.

"segments": the ids are sorted, and each touched row is summed in order and written once.
"atomics": contributions are added where they fall, in no fixed order.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from emu_kernels import backends

PLANS = ("segments", "atomics")

_SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "cuda": ("atomic_gradient", {"segments": False, "atomics": True}),
    "triton": ("table_gradients", {"segments": "sorted", "atomics": "atomic"}),
}
"""By backend: the name of its switch, and what it is set to."""


def _owner(backend: str, name: str) -> Any:
    """What has the switch: the backend or its module."""
    found = backends.get(backend)
    return found if hasattr(found, name) else importlib.import_module(type(found).__module__)


@contextlib.contextmanager
def forced(backend: str, plan: str) -> Iterator[None]:
    """Within it ``backend`` takes ``plan``, where it has the choice.

    Raises:
        AttributeError: it should have one, and has no such switch.
    """
    if backend not in _SWITCHES:
        yield
        return
    name, values = _SWITCHES[backend]
    owner = _owner(backend, name)
    before = getattr(owner, name)
    setattr(owner, name, values[plan])
    try:
        yield
    finally:
        setattr(owner, name, before)
