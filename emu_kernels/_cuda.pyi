# The CUDA kernels (csrc/cuda/bindings.cpp). Arguments named like tensors are addresses on the
# device, 0 for none.

from collections.abc import Sequence

version: str
architectures: str

def toolkit() -> tuple[int, int]: ...
def driver_problem() -> str: ...

class Place:
    def __init__(self, *, device: int, stream: int, processors: int) -> None: ...

class Batch:
    def __init__(
        self,
        *,
        keep: object,
        where: Place,
        query: int,
        table: int,
        table_dtype: str,
        table_stride: int,
        table_rows: int,
        scale: int,
        weights: int,
        positive: int,
        negative: int,
        report: int,
        batch: int,
        dim: int,
        groups: int,
        count: int,
        seed: int,
        thresholds: int,
        row_offset: int,
        mutation: str,
        threshold: int,
        similarity: str,
        phase_scale: float,
    ) -> None: ...
    def loss_workspace(self, need_grad: bool) -> int: ...
    def query_gradient_workspace(self) -> int: ...
    def sort_workspace(self) -> int: ...
    def partials_workspace(self) -> int: ...

class MaskSpec:
    def __init__(
        self, *, mutation: str, seed: int, row_offset: int, threshold: int, thresholds: int
    ) -> None: ...

def loss_forward(
    batch: Batch,
    *,
    beta: float,
    alpha: float,
    coefficients: int,
    sample_weight: int,
    reduction: str,
    loss: int,
    terms: int,
    row_scale: int,
    gradient: Sequence[int],
    need_grad: bool,
    workspace: int,
) -> None: ...
def scores_forward(batch: Batch, positive: int, negative: int, mutated: int, /) -> None: ...
def query_gradient(
    batch: Batch,
    positive_weight: int,
    weight: int,
    mutated_weight: int,
    gradient: Sequence[int],
    workspace: int,
    /,
) -> None: ...
def sort_ids(batch: Batch, sorted: int, /) -> None: ...
def count_touched(batch: Batch, sorted: int, partials: int, /) -> int: ...
def table_gradient(
    batch: Batch,
    row_scale: int,
    weight: int,
    mutated_weight: int,
    grad_positive: int,
    *,
    ids: int,
    out: int,
    sorted: int,
    partials: int,
) -> None: ...
def table_gradient_atomic(
    batch: Batch,
    row_scale: int,
    weight: int,
    mutated_weight: int,
    grad_positive: int,
    *,
    out: int,
    sorted: int,
    partials: int,
) -> None: ...
def mutate_forward(
    positive: int,
    negative: int,
    out: int,
    *,
    dtype: str,
    shape: tuple[int, int, int],
    mask: MaskSpec,
    where: Place,
) -> None: ...
def mutate_backward(
    grad: int,
    grad_positive: int,
    grad_negative: int,
    *,
    dtype: str,
    shape: tuple[int, int, int],
    mask: MaskSpec,
    where: Place,
) -> None: ...
