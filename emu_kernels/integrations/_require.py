"""Checks that an integration's library is installed, in a recent enough version."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def require(distribution: str, minimum: tuple[int, ...], *, extra: str) -> None:
    """Raise an error that says what to install, unless ``minimum`` or a later version is installed.

    Raises:
        ImportError: it is missing or too old.
    """
    wanted = f"{distribution}>={'.'.join(map(str, minimum))}"
    remedy = f"install it with: pip install 'emu-kernels[{extra}]'"
    try:
        found = version(distribution)
    except PackageNotFoundError:
        raise ImportError(f"{wanted} is not installed; {remedy}", name=distribution) from None
    numbers = re.match(r"\d+(\.\d+)*", found)
    release = tuple(map(int, numbers[0].split("."))) if numbers else ()
    if release < minimum:
        raise ImportError(f"{wanted} is needed, {found} is installed; {remedy}", name=distribution)
