"""Relational message passing (NBFNet; Zhu et al., 2021) without an array of edges × batch × d.

``relational_spmm`` is a generalized sparse product: each node gets an aggregate of the messages of
its incoming edges, each made of the source's and the relation's features. ``reference`` is plain
PyTorch and the specification; ``cpu`` and ``triton`` have kernels, which compute each message where
it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emu_kernels import backends, prepare, queries, validate, values
from emu_kernels.backends.native import NativeBackend, pointer
from emu_kernels.backends.triton import TritonBackend
from emu_kernels.library import Values, define, no_second_derivative, refuse_forward_mode

MESSAGES = {
    "distmult": queries.distmult,
    "transe": queries.transe,
    "rotate": queries.complex,  # a rotation where the relation's numbers have modulus 1
}
AGGREGATES = ("sum", "mean", "min", "max", "pna")
BACKENDS = (backends.REFERENCE, "cpu", "triton")
EPSILON = 1e-6
"""The lower bound of the variance in "pna", as in the program of NBFNet's authors."""

_PIECE = 1024  # edges of one relation that are summed at a time in its gradient


class _Sorted(NamedTuple):
    """Edges in some order."""

    start: Tensor  # (N + 1,) where each node's edges begin
    other: Tensor  # (E,) the node at the other end
    relation: Tensor  # (E,)
    edge: Tensor  # (E,) its number in edge_index


@dataclass(frozen=True, eq=False)  # compared by identity, as tensors have no single truth
class RelationalGraph:
    """The edges of a graph, sorted once for all passes.

    Args:
        edge_index: (2, E) integers in [0, num_nodes): sources, then targets, as PyG has them.
        edge_type: (E,) integers in [0, num_relations).
        num_nodes: N, at least 1.
        num_relations: R, at least 1.

    Raises:
        TypeError: a tensor has no integer dtype.
        ValueError: a shape, a device or a number is not as described above, or there are no edges.
        IndexError: an id out of range.
    """

    edge_index: Tensor
    edge_type: Tensor
    num_nodes: int
    num_relations: int
    sorted: tuple[Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        prepare.alone_after_fork()
        index, kind = self.edge_index, self.edge_type
        for name, tensor, shape in (("edge_index", index, "(2, E)"), ("edge_type", kind, "(E,)")):
            validate.tensor(name, tensor)
            validate.integer(name, tensor)
            validate.dims(name, tensor, (2 if name == "edge_index" else 1,), shape)
        if index.shape[0] != 2 or index.shape[1] != len(kind):
            raise ValueError(
                f"edge_index: expected shape (2, E) with edge_type's E = {len(kind)}, "
                f"got {tuple(index.shape)}"
            )
        validate.same_device("edge_index", index, edge_type=kind)
        for name, number in (("num_nodes", self.num_nodes), ("num_relations", self.num_relations)):
            object.__setattr__(self, name, validate.at_least(1, name, number))
        if not len(kind):
            raise ValueError("edge_index: expected at least one edge, got none")
        index, kind = index.long(), kind.long()
        values.check_ids("edge_index", index, rows=self.num_nodes, lowest=0)
        values.check_ids("edge_type", kind, rows=self.num_relations, lowest=0)
        source, target = index
        object.__setattr__(
            self,
            "sorted",
            (
                *_sort(target, source, kind, self.num_nodes),
                *_sort(source, target, kind, self.num_nodes),
                *_pieces(kind, source, target, self.num_relations),
            ),
        )

    @property
    def num_edges(self) -> int:
        return len(self.edge_type)


def _sort(by: Tensor, other: Tensor, kind: Tensor, count: int) -> _Sorted:
    by, edge = by.sort(stable=True)
    start = torch.searchsorted(by, torch.arange(count + 1, device=by.device))
    return _Sorted(start, other[edge], kind[edge], edge)


def _pieces(kind: Tensor, source: Tensor, target: Tensor, count: int) -> tuple[Tensor, ...]:
    """Edges sorted by relation, in pieces: where each piece begins, the relation of each piece;
    the edges' targets, sources, and numbers in edge_index."""
    by, edge = kind.sort(stable=True)
    edges = torch.bincount(by, minlength=count)
    pieces = (edges + _PIECE - 1) // _PIECE
    relation = torch.repeat_interleave(pieces)
    first = edges.cumsum(0) - edges
    place = torch.arange(len(relation), device=by.device) - (pieces.cumsum(0) - pieces)[relation]
    start = torch.cat([first[relation] + place * _PIECE, first.new_tensor([len(by)])])
    return start, relation, target[edge], source[edge], edge


def relational_spmm(
    nodes: Tensor,  # (N, B, D)
    relations: Tensor,  # (R, D) or (R, B, D)
    graph: RelationalGraph,
    *,
    message: str = "distmult",
    aggregate: str = "sum",
    own: Tensor | None = None,  # (N, B, D)
    edge_weight: Tensor | None = None,  # (E,)
    backend: str | None = None,
) -> Tensor:
    """Aggregate messages along a graph's edges at their targets, for B queries at once.

    An edge from u to v of relation r sends ``message(nodes[u], relations[r])``; a node's result is
    the aggregate of what it receives (the generalized Bellman-Ford iteration of NBFNet,
    arXiv 2106.06935, equation 6 and table 1).

    Args:
        nodes: (N, B, D), float32, bfloat16, float16 or float64: a row for each node and query.
        relations: (R, D), the same for all queries, or (R, B, D); dtype of ``nodes``.
        graph: N nodes, R relations, E edges.
        message: "distmult" (x · r), "transe" (x + r), or "rotate" (the complex product: the first
            half of a row holds real parts, the second imaginary parts; D is even).
        aggregate: "sum", "mean", "min", "max", or "pna": mean, min, max and standard deviation
            (Corso et al., 2020), from one pass over the edges.
        own: (N, B, D), dtype of ``nodes``: an additional message to each node (NBFNet's boundary
            condition).
        edge_weight: (E,) in the order of ``graph.edge_index``. bool: edges that are False are left
            out, as if they were not in the graph. float: multiplies the messages; has no gradient.
        backend: as for :func:`emu_kernels.fused_emu_loss`; "reference", "cpu" and "triton" exist.

    Returns:
        (N, B, D), or for "pna" (N, B, 4, D) in the order above; dtype of ``nodes``. 0 at a node
        that receives nothing. Sums are accumulated in float32 (float64 for float64), in a fixed
        order: the same bits in every run, for any number of threads. Several messages that are the
        minimum or maximum get the whole gradient each. The variance of "pna" is at least 1e-6.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape, a device or a name is not as described above, or edge_weight requires
            a gradient.
        RuntimeError: the backend cannot run here.
        NotImplementedError: forward-mode differentiation, which only ``reference`` has.
    """
    prepare.alone_after_fork()
    _check(nodes, relations, graph, message, aggregate, own, edge_weight)
    name = backends.resolve(backend, nodes.device, BACKENDS).name
    real = _real(nodes)
    # Triton's kernels read the dtype of nodes, the others the one that they compute with.
    rows = nodes.dtype if name == "triton" else real
    keep = edge_weight if edge_weight is not None and edge_weight.dtype == torch.bool else None
    weight = None if edge_weight is None or keep is not None else edge_weight.to(real)
    given: dict[str, Any] = {
        "nodes": nodes.to(rows).contiguous(),
        "relations": relations.to(rows).contiguous(),
        "own": None if own is None else own.to(real).contiguous(),
        "weight": None if weight is None else weight.contiguous(),
        "keep": None if keep is None else keep.contiguous(),
    }
    if name == backends.REFERENCE:
        out = _reference(**given, graph=graph, message=message, aggregate=aggregate)
    else:
        sizes = {"num_relations": graph.num_relations, "graph": list(graph.sorted)}
        names = {"message": message, "aggregate": aggregate, "backend": name}
        refuse_forward_mode(*given.values())
        out = _forward(given | sizes | names)
        out = out if aggregate == "pna" else out.squeeze(2)
    return out.to(nodes.dtype)


def _real(nodes: Tensor) -> torch.dtype:
    """The dtype to compute with."""
    return torch.float64 if nodes.dtype == torch.float64 else torch.float32


def _check(
    nodes: Tensor,
    relations: Tensor,
    graph: RelationalGraph,
    message: str,
    aggregate: str,
    own: Tensor | None,
    edge_weight: Tensor | None,
) -> None:
    if not isinstance(graph, RelationalGraph):
        raise TypeError(f"graph: expected a RelationalGraph, got {type(graph).__name__}")
    validate.one_of("message", message, tuple(MESSAGES))
    validate.one_of("aggregate", aggregate, AGGREGATES)
    validate.tensor("nodes", nodes)
    validate.floating("nodes", nodes)
    validate.dims("nodes", nodes, (3,), "(N, B, D)")
    count, batch, dim = nodes.shape
    if count != graph.num_nodes or not batch or not dim:
        raise ValueError(
            f"nodes: expected shape (N, B, D) with the graph's N = {graph.num_nodes}, B and D at "
            f"least 1, got {tuple(nodes.shape)}"
        )
    if message == "rotate" and dim % 2:
        raise ValueError(f"nodes: message 'rotate' needs an even D, got {dim}")
    validate.tensor("relations", relations)
    shapes = ((graph.num_relations, dim), (graph.num_relations, batch, dim))
    _like(nodes, "relations", relations, shapes)
    if own is not None:
        validate.tensor("own", own)
        _like(nodes, "own", own, ((count, batch, dim),))
    if edge_weight is not None:
        validate.tensor("edge_weight", edge_weight)
        if edge_weight.dtype != torch.bool:
            validate.floating("edge_weight", edge_weight)
        if edge_weight.shape != (graph.num_edges,):
            raise ValueError(
                f"edge_weight: expected shape ({graph.num_edges},), one for each edge, "
                f"got {tuple(edge_weight.shape)}"
            )
        if edge_weight.requires_grad:
            raise ValueError("edge_weight: is not differentiated; pass edge_weight.detach()")
    others = {"relations": relations, "own": own, "edge_weight": edge_weight}
    validate.same_device("nodes", nodes, **others, graph=graph.edge_type)


def _like(nodes: Tensor, name: str, value: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if value.dtype != nodes.dtype:
        raise TypeError(f"{name}: expected {nodes.dtype} like nodes, got {value.dtype}")
    if tuple(value.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")


# --- the specification ----------------------------------------------------------------------------


def _extreme(sent: Tensor, at: Tensor, count: int, reduce: str) -> Tensor:
    """(N, B, D): the least or largest of the (M, B, D) messages at each node.

    The second term is 0, and gives each message that is the extreme the whole gradient.
    """
    index = at[:, None, None].expand_as(sent)
    zero = sent.new_zeros((count, *sent.shape[1:]))
    found = zero.scatter_reduce(0, index, sent.detach(), reduce, include_self=False)
    attained = sent.detach() == found[at]
    return found + zero.index_add(0, at, (sent - sent.detach()) * attained)


def _reference(
    nodes: Tensor,
    relations: Tensor,
    own: Tensor | None,
    weight: Tensor | None,
    keep: Tensor | None,
    graph: RelationalGraph,
    message: str,
    aggregate: str,
) -> Tensor:
    source, at = graph.edge_index.long()
    kind = graph.edge_type.long()
    if keep is not None:
        source, at, kind = source[keep], at[keep], kind[keep]
    relation = relations[kind] if relations.ndim == 3 else relations[kind].unsqueeze(1)
    sent = MESSAGES[message](nodes[source], relation)
    if weight is not None:
        sent = sent * weight[:, None, None]
    if own is not None:
        sent, at = torch.cat([own, sent]), torch.cat([torch.arange(len(own), device=at.device), at])
    count = len(nodes)
    zero = nodes.new_zeros(nodes.shape)
    if aggregate in ("min", "max"):
        return _extreme(sent, at, count, f"a{aggregate}")
    total = zero.index_add(0, at, sent)
    if aggregate == "sum":
        return total
    number = torch.bincount(at, minlength=count).clamp(min=1)[:, None, None]
    mean = total / number
    if aggregate == "mean":
        return mean
    square = zero.index_add(0, at, sent * sent) / number
    deviation = (square - mean * mean).clamp(min=EPSILON).sqrt()
    received = (torch.bincount(at, minlength=count) > 0)[:, None, None]
    low, high = _extreme(sent, at, count, "amin"), _extreme(sent, at, count, "amax")
    return torch.stack([mean, low, high, torch.where(received, deviation, 0.0)], dim=2)


# --- the operator ---------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor nodes, Tensor relations, Tensor? own, Tensor? weight, Tensor? keep, "
    "SymInt num_relations, Tensor[] graph, str message, str aggregate, str backend"
)


def _run(given: Values, task: str, out: Tensor, **more: Any) -> Tensor:
    backend = backends.get(given["backend"])
    if isinstance(backend, TritonBackend):
        backend.relational(given, task, out, **more)
        return out
    assert isinstance(backend, NativeBackend)
    nodes, relations = given["nodes"], given["relations"]
    count, batch, dim = nodes.shape
    absent = ("start", "other", "relation", "edge", "share", "grad", "result", "relation_gradient")
    addresses = dict.fromkeys(absent, 0)
    named = {name: given[name] for name in ("own", "weight", "keep")}
    addresses |= {name: pointer(tensor) for name, tensor in (named | more).items()}
    backend._native.relational(
        task=task,
        message=given["message"],
        aggregate=given["aggregate"],
        dtype=str(nodes.dtype).removeprefix("torch."),
        node_count=count,
        relation_count=given["num_relations"],
        batch=batch,
        dim=dim,
        size=len(given["graph"][1]),
        relation_rows=relations.shape[1] if relations.ndim == 3 else 1,
        nodes=pointer(nodes),
        relations=pointer(relations),
        out=pointer(backend._large(out)),
        epsilon=EPSILON,
        threads=backend._place(nodes.device)["threads"],
        **addresses,
    )
    return out


def _number(given: Values) -> Tensor:
    """(N, 1, 1): how many messages each node receives."""
    start, _, _, edge = given["graph"][:4]
    number = start[1:] - start[:-1]
    if given["keep"] is not None:
        kept = torch.cat([start.new_zeros(1), given["keep"][edge].long().cumsum(0)])
        number = kept[start[1:]] - kept[start[:-1]]
    return (number + (given["own"] is not None))[:, None, None]


def _result(given: Values) -> Tensor:
    """(N, B, S, D), uninitialized, with S sections: 4 for "pna", else 1."""
    nodes = given["nodes"]
    count, batch, dim = nodes.shape
    sections = 4 if given["aggregate"] == "pna" else 1
    return nodes.new_empty((count, batch, sections, dim), dtype=_real(nodes))


def _run_forward(given: Values) -> Tensor:
    start, other, relation, edge = given["graph"][:4]
    order = {"start": start, "other": other, "relation": relation, "edge": edge}
    out = _run(given, "forward", _result(given), **order)
    if given["backend"] == "cpu" and given["aggregate"] == "mean":
        out[:, :, 0] /= _number(given).clamp(min=1)
    return out


def _pulls(given: Values, of_own: Tensor) -> Tensor:
    """(N, B, S, D): what gives the gradient of any message to a node; fills in that of ``own``.

    The gradient of a message m is the first section (for "min" and "max" only if m attains it).
    For "pna" add the last section times m, and the second or third if m is the minimum or maximum.
    """
    pulls, result, own = given["grad"].contiguous(), given["result"], given["own"]
    aggregate = given["aggregate"]
    if aggregate in ("mean", "pna"):
        number = _number(given).clamp(min=1)
        pulls = pulls.clone()
        pulls[:, :, 0] /= number
    if aggregate == "pna":
        mean, deviation = result[:, :, 0], result[:, :, 3]
        # Where the variance was raised to EPSILON it is a constant.
        square = pulls[:, :, 3] / (deviation * number)
        pulls[:, :, 3] = square.masked_fill_(deviation <= EPSILON**0.5, 0.0)
        pulls[:, :, 0].addcmul_(pulls[:, :, 3], mean, value=-1)
    if not given["with_own"]:
        return pulls
    of_own.copy_(pulls[:, :, 0])
    if aggregate in ("min", "max"):
        of_own.masked_fill_(own != result[:, :, 0], 0.0)
    if aggregate == "pna":
        of_own.addcmul_(pulls[:, :, 3], own)
        for section in (1, 2):
            of_own += pulls[:, :, section] * (own == result[:, :, section])
    return pulls


def _run_backward(given: Values) -> tuple[Tensor, Tensor, Tensor]:
    nodes, result = given["nodes"], given["result"]
    of_nodes = torch.empty_like(nodes, dtype=result.dtype)
    of_relations = torch.empty_like(given["relations"], dtype=result.dtype)
    of_own = result.new_empty(nodes.shape if given["with_own"] else 0)
    start, other, relation, edge = given["graph"][4:8]
    order = {"start": start, "other": other, "relation": relation, "edge": edge}
    if given["backend"] == "cpu":
        share = None
        if given["aggregate"] in ("mean", "pna"):
            share = _number(given).clamp(min=1).to(result.dtype).reciprocal()
        both = {"grad": given["grad"].contiguous(), "result": result, "share": share}
        _run(given, "backward", of_nodes, relation_gradient=of_relations, **order, **both)
        if given["with_own"]:
            _run(given, "own", of_own, **both)
    else:
        both = {"grad": _pulls(given, of_own), "result": result}
        _run(given, "nodes", of_nodes, **order, **both)
        start, piece_relation, target, source, edge = given["graph"][8:]
        order = {"start": start, "other": target, "source": source, "edge": edge}
        pieces = {"piece_relation": piece_relation, "pieces": len(piece_relation)}
        _run(given, "relations", of_relations, **order, **pieces, **both)
    return of_nodes.to(nodes.dtype), of_relations.to(nodes.dtype), of_own


def _fake_backward(given: Values) -> tuple[Tensor, Tensor, Tensor]:
    nodes, relations = given["nodes"], given["relations"]
    of_own = given["result"].new_empty(nodes.shape if given["with_own"] else 0)
    return torch.empty_like(nodes), torch.empty_like(relations), of_own


_forward = define("relational_spmm", f"{_ARGUMENTS}) -> Tensor", _run_forward, _result)
_backward = define(
    "relational_spmm_backward",
    f"{_ARGUMENTS}, Tensor grad, Tensor result, bool with_own) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_NAMES = tuple(part.split()[1] for part in _ARGUMENTS.split(", "))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = dict(zip(_NAMES, inputs, strict=True))
    optional = [given[name] for name in ("own", "weight", "keep")]
    ctx.save_for_backward(given["nodes"], given["relations"], output, *optional, *given["graph"])
    ctx.rest = {k: given[k] for k in ("num_relations", "message", "aggregate", "backend")}


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    nodes, relations, result, own, weight, keep, *graph = ctx.saved_tensors
    given = {"nodes": nodes, "relations": relations, "own": own, "weight": weight, "keep": keep}
    needed = dict(zip(_NAMES, ctx.needs_input_grad, strict=True))["own"]
    given |= {"graph": graph, "grad": grad, "result": result} | ctx.rest
    given["with_own"] = needed and ctx.rest["aggregate"] != "sum"
    of_nodes, of_relations, of_own = _backward(given)
    gradients = {"nodes": of_nodes, "relations": of_relations, "graph": [None] * len(graph)}
    if needed:
        gradients["own"] = of_own if given["with_own"] else grad.squeeze(2)
    return tuple(gradients.get(name) for name in _NAMES)


def _refuse(ctx: Any, *grad: Tensor) -> Any:
    raise no_second_derivative("relational_spmm")


torch.library.register_autograd("emu_kernels::relational_spmm", _differentiate, setup_context=_save)
torch.library.register_autograd("emu_kernels::relational_spmm_backward", _refuse)
