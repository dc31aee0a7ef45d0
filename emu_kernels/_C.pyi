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
        positive: int,
        negative: int,
        batch: int,
        dim: int,
        groups: int,
        count: int,
        seed: int,
        row_offset: int,
        threshold: int,
        similarity: str,
        threads: int,
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
    weight: int,
    mutated_weight: int,
    grad_query: int,
    grad_positive: int,
    need_grad: bool,
) -> None: ...
def scores_forward(batch: Batch, positive: int, negative: int, mutated: int) -> None: ...
def query_gradient(
    batch: Batch,
    positive_weight: int,
    weight: int,
    mutated_weight: int,
    grad_query: int,
    grad_positive: int,
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
    sparse: bool,
    out: int,
) -> None: ...
def mutate_forward(
    positive: int,
    negative: int,
    out: int,
    *,
    dtype: str,
    shape: tuple[int, int, int],
    seed: int,
    row_offset: int,
    threshold: int,
    threads: int,
) -> None: ...
def mutate_backward(
    grad: int,
    grad_positive: int,
    grad_negative: int,
    *,
    dtype: str,
    shape: tuple[int, int, int],
    seed: int,
    row_offset: int,
    threshold: int,
    threads: int,
) -> None: ...
def philox(counter: list[int], seed: int) -> list[int]: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def compiler() -> str: ...
