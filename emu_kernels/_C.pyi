# The extension module (csrc/bindings.cpp). Arguments named like tensors are addresses, 0 for None.
from typing import Any, TypedDict

version: str

class _Draws(TypedDict):  # and the parameters of the mutation rule, by their names
    mutation: str
    seed: int
    row_offset: int

class _Place(TypedDict):
    threads: int

class _Gradient(TypedDict):
    weight: int
    mutated_weight: int
    grad_query: int
    grad_positive: int
    grad_scale: int
    grad_weights: int

class _Step(TypedDict):
    optimizer: str
    lr: float
    eps: float
    table: int
    sums: int
    count: int
    ids: int
    order: int
    rows: int

class Problem:
    def __init__(
        self,
        *,
        keep: object,
        query: int,
        table: int,
        scale: int,
        weights: int,
        positive: int,
        negative: int,
        report: int,
        dtype: str,
        table_stride: int,
        table_rows: int,
        batch: int,
        dim: int,
        groups: int,
        count: int,
        similarity: str,
        phase_scale: float,
        draws: _Draws,
        place: _Place,
    ) -> None: ...

class Segments:
    def touched(self) -> int: ...

def similarities() -> list[dict[str, Any]]: ...
def mutations() -> list[dict[str, Any]]: ...
def loss_workspace(*, problem: Problem, need_grad: bool) -> int: ...
def query_gradient_workspace(*, problem: Problem) -> int: ...
def loss_forward(
    *,
    problem: Problem,
    beta: float,
    alpha: float,
    coefficients: int,
    sample_weight: int,
    positive_log_q: int,
    negative_log_q: int,
    reduction: str,
    need_grad: bool,
    loss: int,
    terms: int,
    row_scale: int,
    gradient: _Gradient,
    workspace: int,
) -> None: ...
def scores_forward(*, problem: Problem, positive: int, negative: int, mutated: int) -> None: ...
def query_gradient(
    *,
    problem: Problem,
    positive_weight: int,
    weight: int,
    mutated_weight: int,
    gradient: _Gradient,
    workspace: int,
) -> None: ...
def sort_ids(*, problem: Problem) -> Segments: ...
def table_gradient(
    *,
    problem: Problem,
    segments: Segments,
    row_scale: int,
    weight: int,
    mutated_weight: int,
    grad_positive: int,
    ids: int,
    out: int,
    step: _Step | dict[str, Any],  # empty: none
) -> None: ...
def mutate_forward(
    *,
    positive: int,
    negative: int,
    out: int,
    dtype: str,
    batch: int,
    count: int,
    dim: int,
    draws: _Draws,
    place: _Place,
) -> None: ...
def mutate_backward(
    *,
    grad: int,
    grad_positive: int,
    grad_negative: int,
    dtype: str,
    batch: int,
    count: int,
    dim: int,
    draws: _Draws,
    place: _Place,
) -> None: ...
def prefer_huge_pages(*, memory: int, bytes: int) -> None: ...
def philox(*, counter: list[int], seed: int) -> list[int]: ...
def joins_torch() -> bool: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def compiler() -> str: ...
