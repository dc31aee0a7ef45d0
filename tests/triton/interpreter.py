"""Makes Triton's interpreter faster, which describes types and shapes anew for each operation.

With the descriptions kept, tests of interpreted kernels take half of their time. What is computed
stays the same. Most patches are for the release that ``make`` installs only.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import numpy as np
from triton.language import core, semantic
from triton.runtime import interpreter

RELEASE = "3.9."


def install() -> None:
    """Patch Triton's interpreter."""
    InterpretedFunction = interpreter.InterpretedFunction
    call = InterpretedFunction.__call__
    patched: set[str] = set()

    def call_once_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a device function without patching Triton's language again.

        The calling kernel has done so already, and Triton's own modules stay patched.
        """
        module = self.fn.__globals__["__name__"]
        if module.startswith("triton.") and module not in patched:
            patched.add(module)
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call_once_patched
    if version("triton").startswith(RELEASE):
        _describe_once()


def _describe_once() -> None:
    """Keep the description of each type and shape."""
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    describe_block = core.block_type.__init__

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if isinstance(shape, core.tuple) else shape
        space = getattr(element_ty, "address_space", None)
        key = (element_ty.name, space, *(getattr(size, "value", size) for size in sizes))
        if key not in blocks:
            describe_block(self, element_ty, shape)
            self.of_tensor = core.tuple([core.constexpr(size) for size in self.shape])
            self.numel_of_tensor = core.constexpr(math.prod(self.shape))
            blocks[key] = dict(self.__dict__)
        else:
            self.__dict__.update(blocks[key])

    no_shape, one = core.tuple([]), core.constexpr(1)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        block = type.is_block()
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape = type.of_tensor if block else no_shape
        self.numel = type.numel_of_tensor if block else one

    dtypes: dict[str, np.dtype[Any]] = {}
    find_dtype = interpreter._get_np_dtype

    def np_dtype(of: Any) -> np.dtype[Any]:
        element = of.element_ty if isinstance(of, core.block_type) else of
        if element.name not in dtypes:
            dtypes[element.name] = find_dtype(element)
        return dtypes[element.name]

    Semantic = semantic.TritonSemantic
    broadcast = Semantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape.values == b.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    promoted: dict[tuple[Any, ...], Any] = {}
    promote = Semantic.computation_type_impl

    def computation_type_impl(self: Any, a: Any, a_is: Any, b: Any, b_is: Any, div: Any) -> Any:
        key = (a.name, a_is, b.name, b_is, div)
        if key not in promoted:
            promoted[key] = promote(self, a, a_is, b, b_is, div)
        return promoted[key]

    equal, same = core.tuple.__eq__, core.dtype.__eq__

    def tuple_equal(self: Any, other: Any) -> Any:
        if type(other) is list:
            return core.constexpr(self.values == other)
        return equal(self, other)

    def dtype_equal(self: Any, other: Any) -> bool:
        return self is other or same(self, other)

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
    interpreter._get_np_dtype = np_dtype
    Semantic.broadcast_impl_value = broadcast_impl_value
    Semantic.computation_type_impl = computation_type_impl
    core.tuple.__eq__ = tuple_equal
    core.dtype.__eq__ = dtype_equal
