"""Relational message passing: kernels against plain PyTorch, autograd's contracts, bad input."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from emu_kernels import RelationalGraph, backends, relational_spmm
from emu_kernels.relational import AGGREGATES, BACKENDS, MESSAGES

KERNELS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            backends.get(name).unavailable() is not None, reason=f"no kernels of {name} here"
        ),
    )
    for name in ("cpu", "triton")
]
EVERY = [backends.REFERENCE, *KERNELS]


def on(backend: str) -> str:
    """The device that the backend needs its tensors on."""
    return next(iter(backends.get(backend).device_types), "cpu")


def slow_to_run(backend: str) -> bool:
    """Whether the backend is an interpreter."""
    return backend == "triton" and on(backend) == "cpu"


def graph(
    backend: str = "cpu", nodes: int = 9, relations: int = 4, edges: int = 40, seed: int = 0
) -> RelationalGraph:
    """The last node and the last relation have no edge; some edges occur twice."""
    draws = torch.Generator().manual_seed(seed)
    index = torch.randint(nodes - 1, (2, edges), generator=draws)
    kind = torch.randint(relations - 1, (edges,), generator=draws)
    index[:, 0], kind[0] = index[:, 1], kind[1]
    return RelationalGraph(index.to(on(backend)), kind.to(on(backend)), nodes, relations)


def inputs(
    g: RelationalGraph, batch: int, dim: int, dtype: torch.dtype, *, per_query: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, relations, own messages. Some messages are equal, and some 0."""
    draws = torch.Generator().manual_seed(1)
    device = g.edge_type.device

    def some(*shape: int) -> Tensor:
        halves = torch.randint(-3, 4, shape, generator=draws) / 2
        return halves.to(device, dtype).requires_grad_()

    relations = (g.num_relations, batch, dim) if per_query else (g.num_relations, dim)
    return some(g.num_nodes, batch, dim), some(*relations), some(g.num_nodes, batch, dim)


def results(leaves: tuple[Tensor | None, ...], g: RelationalGraph, **options: Any) -> list[Tensor]:
    """The result and its gradients."""
    leaves = tuple(None if x is None else x.detach().clone().requires_grad_() for x in leaves)
    nodes, relations, own = leaves
    assert nodes is not None
    assert relations is not None
    out = relational_spmm(nodes, relations, g, own=own, **options)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
    out.backward(upstream.to(out))
    return [out, *(x.grad for x in leaves if x is not None and x.grad is not None)]


# float32: sums of about 40 numbers in different orders; a deviation's root halves the digits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


# Nodes, relations, edges; queries and components.
SIZES = {
    "part of a vector": ((9, 4, 40), 3, 6),
    "several vectors": ((9, 4, 40), 2, 34),
    "several chunks of queries": ((9, 4, 40), 40, 32),
    "several pieces of a relation": ((5, 2, 3000), 2, 4),
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_reference(size, message, aggregate, dtype, backend):
    sizes, batch, dim = SIZES[size]
    g = graph(backend, *sizes)
    draws = torch.rand(2, g.num_edges, generator=torch.Generator().manual_seed(2)).to(on(backend))
    weights = (None, draws[0] > 0.3, draws[1])
    cases = list(product((False, True), (False, True), weights))
    # Among those left, each value of an argument occurs in one.
    for per_query, alone, weight in cases[:: 4 if slow_to_run(backend) else 1]:
        nodes, relations, own = inputs(g, batch, dim, dtype, per_query=per_query)
        leaves = (nodes, relations, None if alone else own)
        options = {"message": message, "aggregate": aggregate, "edge_weight": weight}
        expected = results(leaves, g, backend="reference", **options)
        found = results(leaves, g, backend=backend, **options)
        for x, y in zip(found, expected, strict=True):
            scale = y.abs().max().clamp(min=1.0)
            assert (x - y).abs().max() <= TOLERANCES[dtype] * scale


def test_by_hand():
    """Node 2 receives 1 · 3 and 2 · −1 from the others."""
    g = RelationalGraph(torch.tensor([[0, 1], [2, 2]]), torch.tensor([0, 1]), 3, 2)
    nodes = torch.tensor([1.0, 2.0, 7.0]).view(3, 1, 1)
    relations = torch.tensor([[3.0], [-1.0]])
    found = {a: relational_spmm(nodes, relations, g, aggregate=a)[2].tolist() for a in AGGREGATES}
    pna = [pytest.approx([x]) for x in (0.5, -2.0, 3.0, 2.5)]
    one = {"sum": [[1.0]], "mean": [[0.5]], "min": [[-2.0]], "max": [[3.0]], "pna": [pna]}
    assert found == one
    assert relational_spmm(nodes, relations, g, message="transe")[2].item() == 5.0
    assert relational_spmm(nodes, relations, g)[:2].abs().sum() == 0.0  # nothing arrives there
    i = torch.tensor([[[0.0, 1.0]]])  # i · i = −1
    one_edge = RelationalGraph(torch.tensor([[0], [0]]), torch.tensor([0]), 1, 1)
    assert relational_spmm(i, i[0], one_edge, message="rotate").tolist() == [[[-1.0, 0.0]]]


@pytest.mark.parametrize("backend", EVERY)
def test_edges_left_out_are_as_if_they_were_not_there(backend):
    """Even if their messages would be NaN."""
    g = graph(backend)
    keep = torch.rand(g.num_edges, device=on(backend)) > 0.5
    keep &= g.edge_index[0] != 3
    less = RelationalGraph(g.edge_index[:, keep], g.edge_type[keep], g.num_nodes, g.num_relations)
    leaves = inputs(g, 2, 4, torch.float64)
    with torch.no_grad():
        leaves[0][3] = float("nan")
    for aggregate in AGGREGATES:
        options = {"aggregate": aggregate, "backend": backend}
        found = results(leaves, g, edge_weight=keep, **options)
        for x, y in zip(found, results(leaves, less, **options), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("backend", EVERY)
def test_gradcheck(backend, aggregate):
    """Without equal edges: an extreme that two messages share has no derivative."""
    index = torch.tensor([[0, 1, 2, 0, 1, 1, 2], [1, 2, 0, 2, 0, 1, 1]], device=on(backend))
    kind = torch.tensor([0, 1, 2, 2, 0, 1, 0], device=on(backend))
    g = RelationalGraph(index, kind, 4, 4)
    leaves = [torch.randn_like(x).requires_grad_() for x in inputs(g, 2, 4, torch.float64)]

    def call(nodes: Tensor, relations: Tensor, own: Tensor) -> Tensor:
        return relational_spmm(nodes, relations, g, own=own, aggregate=aggregate, backend=backend)

    # Fast mode, in two random directions, if the interpreter would take minutes.
    assert torch.autograd.gradcheck(call, leaves, fast_mode=slow_to_run(backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_operator_keeps_its_contract(backend):
    g = graph(backend)
    nodes, relations, own = inputs(g, 2, 4, torch.float32)
    keep = torch.rand(g.num_edges, device=on(backend)) > 0.5
    arguments = (nodes, relations, own, None, keep, g.num_relations, list(g.sorted), "rotate")
    torch.library.opcheck(torch.ops.emu_kernels.relational_spmm, (*arguments, "pna", backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_compile(backend):
    g = graph(backend)
    leaves = inputs(g, 2, 4, torch.float32)
    options = {"aggregate": "pna", "backend": backend}

    def call(nodes: Tensor, relations: Tensor, own: Tensor) -> Tensor:
        return relational_spmm(nodes, relations, g, own=own, **options).square().sum()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves), leaves)
    for x, y in zip(found, torch.autograd.grad(call(*leaves), leaves), strict=True):
        assert torch.equal(x, y)


def test_bits_do_not_depend_on_threads():
    backend = "cpu"
    g = graph(nodes=50, relations=3, edges=4000)
    leaves = inputs(g, 5, 8, torch.float32)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(results(leaves, g, aggregate="pna", backend=backend))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", EVERY)
def test_low_precision_is_that_of_float32_rounded(backend, dtype):
    """Also gradients, which are computed from an upstream gradient that is already rounded."""
    g = graph(backend)
    leaves = tuple(x.detach() for x in inputs(g, 2, 4, dtype))
    options = {"aggregate": "pna", "backend": backend}
    low = results(leaves, g, **options)
    wide = tuple(x.float().requires_grad_() for x in leaves)
    high = relational_spmm(wide[0], wide[1], g, own=wide[2], **options)
    upstream = torch.linspace(-1, 2, high.numel(), dtype=torch.float64).view_as(high)
    high.backward(upstream.to(high.device, dtype).float())
    gradients = [leaf.grad for leaf in wide if leaf.grad is not None]
    for x, y in zip(low, (high, *gradients), strict=True):
        assert x.dtype == dtype
        assert torch.equal(x, y.to(dtype))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("backend", EVERY)
def test_nan_reaches_the_result(backend, aggregate):
    device = on(backend)
    index, kind = torch.tensor([[0, 1, 0], [2, 2, 2]]), torch.zeros(3).long()
    g = RelationalGraph(index.to(device), kind.to(device), 3, 1)
    relations = torch.ones(1, 2, device=device)
    options = {"aggregate": aggregate, "backend": backend}
    for bad in (0, 1):
        nodes = torch.ones(3, 1, 2, device=device)
        nodes[bad] = float("nan")
        assert relational_spmm(nodes, relations, g, **options)[2].isnan().all()
    own = torch.full_like(nodes, float("nan"))
    assert relational_spmm(torch.ones_like(own), relations, g, own=own, **options).isnan().all()


def test_sizes_may_be_tensors():
    edges = torch.tensor([[0, 2], [1, 0]])
    graph = RelationalGraph(edges, edges[0], edges.max() + 1, 3)  # type: ignore[arg-type]
    assert graph.num_nodes == 3
    assert relational_spmm(torch.ones(3, 1, 2), torch.ones(3, 2), graph).shape == (3, 1, 2)


def test_graphs_are_compared_by_identity():
    g = graph("cpu")
    assert g == g
    assert g != copy.deepcopy(g)
    assert len({g, copy.deepcopy(g)}) == 2


@pytest.mark.parametrize("backend", KERNELS)
def test_forward_mode_is_refused(backend):
    g = graph(backend)
    nodes, relations, _ = (
        None if t is None else t.detach() for t in inputs(g, 2, 4, torch.float64)
    )
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(
            lambda x: relational_spmm(x, relations, g, backend=backend), (nodes,), (nodes,)
        )


@pytest.mark.parametrize("backend", KERNELS)
def test_no_second_derivative(backend):
    g = graph(backend)
    nodes, relations, _ = inputs(g, 2, 4, torch.float64)
    out = relational_spmm(nodes, relations, g, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), nodes, create_graph=True)
    with pytest.raises(RuntimeError, match="relational_spmm has no second derivative"):
        grad.sum().backward()


def test_triton_is_the_default_on_a_gpu(monkeypatch):
    """It is the fastest backend that has the function; here all appear to be able to run."""
    for name in ("cuda", "triton"):
        monkeypatch.setattr(type(backends.get(name)), "unavailable", lambda self: None)
        monkeypatch.setattr(type(backends.get(name)), "device_types", ("cuda",))
    gpu = torch.device("cuda")
    assert backends.default_backend(gpu) == "cuda"
    assert backends.resolve(None, gpu, BACKENDS).name == "triton"
    assert backends.resolve(None, torch.device("mps"), BACKENDS).name == backends.REFERENCE


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"nodes": torch.zeros(8, 2, 4)}, ValueError, r"nodes: .* the graph's N = 9"),
        ({"nodes": torch.zeros(9, 4)}, ValueError, r"nodes: expected shape \(N, B, D\)"),
        ({"nodes": torch.zeros(9, 2, 4).long()}, TypeError, "nodes: expected float32"),
        ({"nodes": torch.zeros(9, 0, 4)}, ValueError, "B and D at least 1"),
        ({"relations": torch.zeros(3, 4)}, ValueError, r"relations: expected shape \(4, 4\) or"),
        ({"relations": torch.zeros(4, 4).double()}, TypeError, "relations: expected torch.float32"),
        ({"own": torch.zeros(9, 4)}, ValueError, r"own: expected shape \(9, 2, 4\)"),
        ({"edge_weight": torch.ones(39)}, ValueError, r"edge_weight: expected shape \(40,\)"),
        ({"edge_weight": torch.ones(40).long()}, TypeError, "edge_weight: expected float32"),
        ({"edge_weight": torch.ones(40).requires_grad_()}, ValueError, "is not differentiated"),
        ({"message": "hake"}, ValueError, "message: expected one of 'distmult', 'transe'"),
        ({"aggregate": "median"}, ValueError, "aggregate: expected one of 'sum', 'mean'"),
        ({"graph": torch.zeros(2, 40)}, TypeError, "graph: expected a RelationalGraph"),
        ({"backend": "cupy"}, ValueError, "expected None or one of 'reference', 'cpu', 'triton'"),
        ({"backend": "cuda"}, ValueError, "backend: expected None or one of"),
    ],
)
def test_bad_input(change, error, said):
    given: dict[str, Any] = {
        "nodes": torch.zeros(9, 2, 4), "relations": torch.zeros(4, 4), "graph": graph(),
    }  # fmt: skip
    with pytest.raises(error, match=said):
        relational_spmm(**given | change)
    odd = given | {"nodes": torch.zeros(9, 2, 3), "relations": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match="needs an even D, got 3"):
        relational_spmm(**odd, message="rotate")


@pytest.mark.parametrize(
    ("index", "kind", "sizes", "said"),
    [
        ([[0], [9]], [0], (9, 1), r"edge_index: .*9"),
        ([[0], [-1]], [0], (9, 1), "edge_index: .*-1"),
        ([[0], [1]], [1], (9, 1), "edge_type: .*1"),
        ([[], []], [], (9, 1), "at least one edge"),
        ([[0, 1], [1, 0]], [0], (9, 1), r"edge_index: expected shape \(2, E\)"),
        ([[0], [1]], [0], (0, 1), "num_nodes: expected at least 1, got 0"),
        ([[0], [1]], [0], (2.5, 1), "num_nodes: expected an int, got float"),
        ([[0], [1]], [0], (9, None), "num_relations: expected an int, got NoneType"),
    ],
)
def test_bad_graph(index, kind, sizes, said):
    with pytest.raises((ValueError, IndexError, TypeError), match=said):
        RelationalGraph(torch.tensor(index).long(), torch.tensor(kind).long(), *sizes)
