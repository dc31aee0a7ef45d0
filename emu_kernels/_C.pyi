# The extension module (csrc/bindings.cpp). Arguments named like tensors are addresses, 0 for none.
from typing import Any

version: str

class Batch:
    def __init__(
        self,
        *,
        keep: Any,
        query: int,
        table: int,
        table_dtype: str,
        table_stride: int,
        table_rows: int,
        scale: int,
        weights: int,
        positive: int,
        negative: int,
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
        threads: int,
    ) -> None: ...

class MaskSpec:
    def __init__(
        self, *, mutation: str, seed: int, row_offset: int, threshold: int, thresholds: int
    ) -> None: ...

class Segments:
    def __init__(self, batch: Batch) -> None: ...
    def touched(self) -> int: ...

def loss_forward(
    batch: Batch,
    *,
    beta: float,
    alpha: float,
    sample_weight: int,
    reduction: str,
    loss: int,
    terms: int,
    row_scale: int,
    gradient: tuple[int, ...],
    need_grad: bool,
) -> None: ...
def scores_forward(batch: Batch, positive: int, negative: int, mutated: int) -> None: ...
def query_gradient(
    batch: Batch,
    positive_weight: int,
    weight: int,
    mutated_weight: int,
    gradient: tuple[int, ...],
) -> None: ...
def table_gradient(
    batch: Batch,
    segments: Segments,
    row_scale: int,
    weight: int,
    mutated_weight: int,
    grad_positive: int,
    *,
    ids: int,
    out: int,
) -> None: ...
def mutate_forward(
    positive: int,
    negative: int,
    out: int,
    *,
    dtype: str,
    shape: tuple[int, int, int],
    mask: MaskSpec,
    threads: int,
) -> None: ...
def mutate_backward(
    grad: int,
    grad_positive: int,
    grad_negative: int,
    *,
    dtype: str,
    shape: tuple[int, int, int],
    mask: MaskSpec,
    threads: int,
) -> None: ...
def prefer_huge_pages(memory: int, bytes: int) -> None: ...
def find_bad_id(ids: int, count: int, lowest: int, rows: int, threads: int) -> int: ...
def scale_rows(
    rows: int, scale: int, out: int, count: int, dim: int, wide: bool, threads: int
) -> None: ...
def philox(counter: list[int], seed: int) -> list[int]: ...
def joins_torch() -> bool: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def compiler() -> str: ...
