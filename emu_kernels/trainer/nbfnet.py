"""NBFNet (Zhu et al., NeurIPS 2021, arXiv 2106.06935): entities are scored by the paths to them.

Entities have no embeddings. For a query (h, r, ?) a generalized Bellman-Ford iteration over the
graph's edges gives each node features, and a small network turns them into a score. So the entities
of another graph can be ranked too. EMU mutates the features of the negatives toward those of the
positive; the network's other input, the query, is the same for both.

The arithmetic is that of the authors' programs, github.com/DeepGraphLearning/NBFNet and
github.com/KiddoZhu/NBFNet-PyG.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from emu_kernels import EmuScores, Expected, Mixup, emu_mutate, uls_cross_entropy
from emu_kernels.backends import REFERENCE
from emu_kernels.reference import reduce, softmax_rows
from emu_kernels.relational import AGGREGATES, MESSAGES, RelationalGraph, relational_spmm

from .batches import Batch
from .data import Direction, Graph, with_inverses
from .errors import ConfigError
from .models import Score, Scorer
from .settings import AT_LEAST_1, setting

if TYPE_CHECKING:
    from .config import Config

_FLOATS = 1 << 23  # numbers of node features computed at once in evaluation and prediction
_LEAST_SCALE = 1e-2  # of PNA's attenuation, as in the authors' programs


@dataclass(frozen=True)
class NBFNetOptions:
    """NBFNet (also sets its authors' defaults for the options below)"""

    layers: int | None = setting(
        None, "Bellman-Ford iterations, a layer each (default 6)", limit=AT_LEAST_1
    )
    message: str | None = setting(
        None, "the message along an edge (default distmult)", choices=tuple(MESSAGES)
    )
    aggregate: str | None = setting(
        None,
        "how a node combines its messages (default pna, with degree scalers)",
        choices=AGGREGATES,
    )
    relation_features: str | None = setting(
        None,
        "where a layer gets them: from a linear layer of the query, or a table (default query)",
        choices=("query", "table"),
    )
    removed_edges: str | None = setting(
        None,
        "edges that a training step leaves out: own, those of its triples; or one-hop, all between "
        "the given entity and its candidates (default own)",
        choices=("own", "one-hop"),
    )


class Edges(NamedTuple):
    """The edges that messages pass along, and the degree scalers of PNA (Corso et al., 2020)."""

    graph: RelationalGraph
    keep: Tensor | None  # (E,) bool
    scalers: Tensor  # (N, 3): 1, log(degree + 1) over its mean, the inverse of that


class Facts:
    """A graph's training triples and their inverses, as edges.

    Args:
        triples: (M, 3) on the device to compute on, M > 0.
    """

    def __init__(self, triples: Tensor, num_entities: int, num_relations: int) -> None:
        self._triples = triples
        self._num_entities, self._num_relations = num_entities, num_relations
        source, relation, target = with_inverses(triples, num_relations).T
        index = torch.stack([source, target])
        self._graph = RelationalGraph(index, relation, num_entities, 2 * num_relations)

    def edges(self, keep: Tensor | None = None) -> Edges:
        """All edges, or those of the triples to keep, (M,) bool."""
        target = self._graph.edge_index[1]
        keep = None if keep is None else keep.repeat(2)
        target = target if keep is None else target[keep]
        degree = 1 + target.bincount(minlength=self._num_entities)  # a node's own message counts
        scale = degree.double().log()
        scale = scale / scale.mean().clamp(min=1e-30)  # all are 0 if there are no edges
        inverse = 1 / scale.clamp(min=_LEAST_SCALE)
        return Edges(self._graph, keep, torch.stack([torch.ones_like(scale), scale, inverse], 1))

    def kept(self, given: Tensor, relation: Tensor, positive: Tensor) -> Tensor:
        """(M,) bool: False for the triples of the batch, whose relations may be inverses."""
        inverse = relation >= self._num_relations
        head, tail = torch.where(inverse, positive, given), torch.where(inverse, given, positive)
        ours = torch.stack([head, relation % self._num_relations, tail])
        size = self._num_entities

        def keys(triples: Tensor) -> Tensor:
            return (triples[0] * self._num_relations + triples[1]) * size + triples[2]

        return torch.isin(keys(self._triples.T), keys(ours), invert=True)

    def far(self, given: Tensor, candidates: Tensor) -> Tensor:
        """(M,) bool: False for triples between (B,) entities and their candidates (B, C)."""

        def keys(a: Tensor, b: Tensor) -> Tensor:
            return torch.minimum(a, b) * self._num_entities + torch.maximum(a, b)

        ours = keys(given[:, None], candidates).flatten()
        return torch.isin(keys(self._triples[:, 0], self._triples[:, 2]), ours, invert=True)


class Layer(nn.Module):
    """One iteration: equation 6 of the paper, a linear layer, layer norm, ReLU and the shortcut."""

    def __init__(self, dim: int, relations: int, aggregate: str, message: str, table: bool) -> None:
        super().__init__()
        self.aggregate, self.message = aggregate, message
        parts = 13 if aggregate == "pna" else 2  # the node itself; 4 aggregates times 3 scalers
        self.linear = nn.Linear(parts * dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.relation: nn.Module = (
            nn.Embedding(relations, dim) if table else nn.Linear(dim, relations * dim)
        )

    def forward(
        self, nodes: Tensor, query: Tensor, boundary: Tensor, edges: Edges, backend: str | None
    ) -> Tensor:
        """(N, B, d) from nodes and boundary (N, B, d) and query (B, d)."""
        dim = nodes.shape[-1]
        if isinstance(self.relation, nn.Embedding):
            relations = self.relation.weight
        else:
            relations = self.relation(query).view(len(query), -1, dim).transpose(0, 1)
        received = relational_spmm(
            nodes,
            relations,
            edges.graph,
            message=self.message,
            aggregate=self.aggregate,
            own=boundary,
            edge_weight=edges.keep,
            backend=backend,
        )
        own, others = self.linear.weight.split([dim, self.linear.in_features - dim], dim=1)
        new = linear(nodes, own, self.linear.bias)
        if self.aggregate == "pna":
            new = _add_scaled(new, received.flatten(2), others, edges.scalers.to(nodes))
        else:
            new = new + linear(received, others)
        return nodes + self.norm(new).relu()


def _add_scaled(new: Tensor, received: Tensor, weight: Tensor, scalers: Tensor) -> Tensor:
    """``new`` (N, B, d) plus a linear layer, (d, 12d), of ``received`` (N, B, 4d) times each of
    the scalers (N, 3).

    A scaler is one number for each node, so it can multiply the weight or the layer's output,
    whichever is smaller, and no array is 12d wide.
    """
    by_scaler = weight.unflatten(1, (3, -1)).permute(1, 2, 0)  # (3, 4d, d)
    if received.shape[1] <= len(weight):
        made = (received @ by_scaler.transpose(0, 1).flatten(1)).chunk(3, dim=-1)
        for scaler, part in zip(scalers.T, made, strict=True):
            new = torch.addcmul(new, scaler[:, None, None], part)
        return new
    of_nodes = (scalers @ by_scaler.flatten(1)).unflatten(1, by_scaler.shape[1:])  # (N, 4d, d)
    return new + received @ of_nodes


class Readout(nn.Module):
    """A score from a node's features and the query's, d each: two linear layers, ReLU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * dim, 2 * dim)
        self.score = nn.Linear(2 * dim, 1)

    def forward(self, features: Tensor, query: Tensor) -> Tensor:
        """(...) from features and query (..., d), which broadcast."""
        score: Tensor = self.score(self._hidden(features, query).relu()).squeeze(-1)
        return score

    def moments(self, features: Tensor, variance: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (...) of the score where features (..., d) have independent variances.

        By the delta method: the score is piecewise linear, as the ReLU is.
        """
        hidden = self._hidden(features, query)
        of_features = self.hidden.weight[:, : features.shape[-1]]
        slope = ((hidden > 0) * self.score.weight[0]) @ of_features
        mean: Tensor = self.score(hidden.relu()).squeeze(-1)
        return mean, (slope.square() * variance).sum(-1)

    def _hidden(self, features: Tensor, query: Tensor) -> Tensor:
        of_features, of_query = self.hidden.weight.chunk(2, dim=1)
        return linear(features, of_features) + linear(query, of_query, self.hidden.bias)


@dataclass(frozen=True)
class Candidates:
    """The features of a batch's positives and negatives, for the losses."""

    config: Config
    readout: Readout
    query: Tensor  # (B, d)
    positive: Tensor  # (B, d)
    negative: Tensor  # (B, K, d)
    real: Tensor  # (B, K) bool, False at padding
    sample_weight: Tensor | None
    seed: int  # of the masks

    def scores(self) -> EmuScores:
        positive, negative = self._positive(), self._negative(self.negative)
        return EmuScores(positive, negative, negative, negative)

    def softmax(self) -> Tensor:
        return self._mean(softmax_rows(self._positive(), self._negative(self.negative)))

    def emu(self, mutation_rate: float | Mixup | Expected) -> Tensor:
        positive, negative = self._positive(), self._negative(self.negative)
        mutated, cumulant = negative, None
        if isinstance(mutation_rate, Expected):
            mutated, cumulant = self._moments(mutation_rate)
        elif mutation_rate:
            assert isinstance(mutation_rate, float)
            features = emu_mutate(
                self.positive,
                self.negative,
                mutation_rate=mutation_rate,
                seed=self.seed,
                backend=self.config.backend,
            )
            mutated = self._negative(features)
        rows = uls_cross_entropy(
            positive, mutated, beta=self.config.beta, cumulant=cumulant, reduction="none"
        )
        return self._mean(rows + self.config.alpha * softmax_rows(positive, negative))

    def _positive(self) -> Tensor:
        score: Tensor = self.readout(self.positive, self.query)
        return score

    def _negative(self, features: Tensor) -> Tensor:
        return self._padded(self.readout(features, self.query[:, None]))

    def _moments(self, mutation: Expected) -> tuple[Tensor, Tensor]:
        """(B, K) means and cumulants of the mutated negatives' scores."""
        rate = mutation.rate
        assert isinstance(rate, float)
        gap = self.positive[:, None] - self.negative
        mean, variance = self.readout.moments(
            self.negative + rate * gap, rate * (1 - rate) * gap.square(), self.query[:, None]
        )
        return self._padded(mean), self._padded(mean + variance / 2)

    def _padded(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.real, float("-inf"))

    def _mean(self, rows: Tensor) -> Tensor:
        return reduce(rows, self.sample_weight, "mean")


class NBFNet(Scorer, name="NBFNet"):
    """A score of the paths from h to t, given r.

    Nodes begin with the boundary condition: h has the features of r, all others have 0. Heads are
    predicted as tails of inverse relations.

    Args:
        num_entities: not used; all models take it.
        num_relations: R; with their inverses 2R.
        dim: d, the width of features.
        generator: seeds the initial values, which are those of ``torch.nn``'s layers.
        backend: "reference" also computes messages; any other leaves them to the default.
        layers, message, aggregate, relation_features, removed_edges: see :class:`NBFNetOptions`.
    """

    keywords = ("backend",)
    options = tuple(field.name for field in fields(NBFNetOptions))
    defaults: ClassVar[dict[str, Any]] = {
        "dim": 32,
        "loss": "selfadv",
        "batch_size": 64,
        "corruption": "both",
        "sampler": "strict",
        "negatives": 32,
        "optimizer": "Adam",
        "lr": 5e-3,
    }
    without: ClassVar[tuple[str, ...]] = (
        "norm",
        "margin",
        "mask_unit",
        "init_entities",
        "freeze_entities",
        "sparse",
        "regularization",
        "tsv",
    )
    """Settings for embeddings."""

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        dim: int,
        generator: torch.Generator,
        *,
        backend: str | None = None,
        layers: int = 6,
        message: str = "distmult",
        aggregate: str = "pna",
        relation_features: str = "query",
        removed_edges: str = "own",
    ) -> None:
        super().__init__()
        self.num_relations = num_relations
        self.removed_edges = removed_edges
        self._backend = backend if backend == REFERENCE else None
        table = relation_features == "table"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())
            self.query = nn.Embedding(2 * num_relations, dim)
            self.layers = nn.ModuleList(
                Layer(dim, 2 * num_relations, aggregate, message, table) for _ in range(layers)
            )
            self.readout = Readout(dim)

    @classmethod
    def settle(cls, config: Config) -> dict[str, Any]:
        for field in fields(config):
            if field.name in cls.without and getattr(config, field.name) not in (field.default, 0):
                raise ConfigError(
                    f"{field.name} must be left out: NBFNet has no embeddings to set it for"
                )
        if config.over_all or config.loss == "mixup":
            raise ConfigError("loss: NBFNet needs one with sampled negatives, other than mixup")
        default = inspect.signature(cls).parameters
        settled = {k: default[k].default for k in cls.options if getattr(config, k) is None}
        if config.message == "rotate" and config.dim % 2:
            raise ConfigError(f"message 'rotate' needs an even dim, got {config.dim}")
        return settled | {"inverse_relations": True}

    def features(self, edges: Edges, given: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        """(N, B, d) of all nodes for (given, relation, ?), both (B,), and (B, d) of the queries.

        Args:
            relation: ids from R on are inverses.
        """
        query = embedding(relation, self.query.weight)
        rows = torch.arange(len(given), device=given.device)
        boundary = query.new_zeros(edges.graph.num_nodes, *query.shape)
        boundary = boundary.index_put((given, rows), query)
        nodes = boundary
        for layer in self.layers:
            nodes = layer(nodes, query, boundary, edges, self._backend)
        return nodes, query

    def scorer(self, graph: Graph) -> Score:
        edges = self._facts(graph).edges()
        size = max(1, _FLOATS // (graph.num_entities * self.query.embedding_dim))

        def score(given: Tensor, relation: Tensor, direction: Direction) -> Tensor:
            queries = torch.stack([given, self._asked(relation, direction)])
            queries, place = queries.unique(dim=1, return_inverse=True)
            scores = [
                self.readout(*self.features(edges, *part)).T for part in queries.split(size, 1)
            ]
            return torch.cat(scores)[place]

        return score

    def comparer(
        self, config: Config, graph: Graph
    ) -> Callable[[Batch, Tensor, Tensor | None, int], Candidates]:
        facts = self._facts(graph)

        def compare(
            batch: Batch, negative: Tensor, sample_weight: Tensor | None, seed: int
        ) -> Candidates:
            given, positive = batch.given, batch.positive
            relation = self._asked(batch.relation, batch.direction)
            negative = negative.repeat_interleave(len(given) // len(negative), dim=0)
            real = negative >= 0
            ids = torch.where(real, negative, positive[:, None])
            ids = torch.cat([positive[:, None], ids], dim=1)  # (B, 1 + K)
            if self.removed_edges == "own":
                keep = facts.kept(given, relation, positive)
            else:
                keep = facts.far(given, ids)
            nodes, query = self.features(facts.edges(keep), given, relation)
            rows = torch.arange(len(given), device=given.device)[:, None]
            features = nodes[ids, rows]  # (B, 1 + K, d)
            return Candidates(
                config=config,
                readout=self.readout,
                query=query,
                positive=features[:, 0],
                negative=features[:, 1:],
                real=real,
                sample_weight=sample_weight,
                seed=seed,
            )

        return compare

    def _asked(self, relation: Tensor, direction: Direction) -> Tensor:
        return relation + self.num_relations if direction == "head" else relation

    def _facts(self, graph: Graph) -> Facts:
        train = graph.triples["train"].to(self.device)
        return Facts(train, graph.num_entities, graph.num_relations)
