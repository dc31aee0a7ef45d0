# The CUDA kernels (csrc/cuda/bindings.cpp). _C.pyi declares what both modules have; here addresses
# are on the device, and a _Place has the keys device, stream and processors.
from emu_kernels._C import Problem as Problem
from emu_kernels._C import loss_forward as loss_forward
from emu_kernels._C import loss_workspace as loss_workspace
from emu_kernels._C import mutate_backward as mutate_backward
from emu_kernels._C import mutate_forward as mutate_forward
from emu_kernels._C import mutations as mutations
from emu_kernels._C import query_gradient as query_gradient
from emu_kernels._C import query_gradient_workspace as query_gradient_workspace
from emu_kernels._C import scores_forward as scores_forward
from emu_kernels._C import similarities as similarities

version: str
architectures: str

def toolkit() -> tuple[int, int]: ...
def driver_problem() -> str: ...
def sort_workspace(*, problem: Problem) -> int: ...
def partials_workspace(*, problem: Problem) -> int: ...
def sort_ids(*, problem: Problem, sorted: int) -> None: ...
def list_ids(*, problem: Problem, sorted: int) -> None: ...
def count_touched(*, problem: Problem, sorted: int, partials: int) -> int: ...
def table_gradient(
    *,
    problem: Problem,
    row_scale: int,
    weight: int,
    mutated_weight: int,
    grad_positive: int,
    ids: int,
    out: int,
    sorted: int,
    partials: int,
) -> None: ...
def table_gradient_atomic(
    *,
    problem: Problem,
    row_scale: int,
    weight: int,
    mutated_weight: int,
    grad_positive: int,
    out: int,
    sorted: int,
) -> None: ...
