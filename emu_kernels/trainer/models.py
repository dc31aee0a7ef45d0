"""Models: a query from an entity and a relation, and the similarity that compares it.

A model's score is φ(query, candidate), where the query is all of the score except the entity that
is predicted. Only φ over many candidates takes long, and the kernels compute it. A model here is a
table of entities, a table of relations, and a small piece of ordinary PyTorch between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from emu_kernels import emu_scores, queries

from .data import Direction, Graph
from .settings import AT_LEAST_0, AT_LEAST_1, setting

if TYPE_CHECKING:
    from .batches import Batch
    from .config import Config
    from .losses import Compared

_CANDIDATES = 256  # scored at once: a tile of so many rows stays in a CPU's cache


class Query(NamedTuple):
    """The side of φ that candidates are compared with."""

    vector: Tensor  # (B, D)
    scale: Tensor | None = None  # a: multiplies the candidates' components


Score = Callable[[Tensor, Tensor, Direction], Tensor]
"""Scores (Q, N) of all entities, for given entities and relations (Q,)."""

SCORERS: dict[str, type[Scorer]] = {}
MODELS: dict[str, type[Model]] = {}
"""The scorers that have embeddings of entities."""


class Scorer(nn.Module):
    """A model, as checks, evaluation and predictions use it.

    ``class Name(Scorer, name="Name")`` enters the subclass into :data:`SCORERS`.
    """

    norms: ClassVar[tuple[int, ...]] = ()
    regularization: ClassVar[float] = 0.0  # L3, of the model's baseline in EMU's paper
    keywords: ClassVar[tuple[str, ...]] = ()  # common settings that __init__ takes
    options: ClassVar[tuple[str, ...]] = ()  # settings of this model only, which __init__ takes too
    without: ClassVar[tuple[str, ...]] = ()  # settings that make no sense with it
    defaults: ClassVar[dict[str, Any]] = {}  # of emu-train, instead of the settings' own

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is not None:
            SCORERS[name] = cls

    @classmethod
    def settle(cls, config: Config) -> dict[str, Any]:
        """Settings that follow from others, by name.

        Raises:
            ConfigError: settings that make no sense with this model.
        """
        return {}

    def scorer(self, graph: Graph) -> Score:
        """A function that scores all entities of a graph; make it once for many queries."""
        raise NotImplementedError

    def comparer(
        self, config: Config, graph: Graph
    ) -> Callable[[Batch, Tensor, Tensor | None, int], Compared]:
        """A function from a batch, negatives (G, K), weights (B,) and a seed to a loss's inputs.

        For models without embeddings: :class:`Model` is trained by :class:`.losses.Step`.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Model(Scorer):
    """Two embedding tables and the query between them.

    ``class DistMult(Model, name="DistMult")`` enters the subclass into :data:`MODELS`.

    Args:
        num_entities: N.
        num_relations: R.
        dim: d, the model's dimension; a row may be wider (ComplEx stores 2d reals).
        generator: draws the initial values, U(−(γ+2)/d, (γ+2)/d), on the CPU.
        margin: γ. A softmax loss depends on it only through the initial values.
        norm: p of the distance's p-norm, in models that have the choice (``norms``).
        inverse_relations: give each relation a second row, R rows further, for (?, r, t), which
            then becomes (t, r⁻¹, ?), as in Lacroix et al. (2018) and Kazemi and Poole (2018).
    """

    entity_width: ClassVar[int] = 1  # reals an entity row holds for each dimension
    relation_width: ClassVar[int] = 1
    keywords = ("margin", "norm", "inverse_relations")

    similarity: str  # the kernels' name of φ
    phase_scale: float = 1.0  # κ of φ
    similarity_weights: nn.Parameter | None  # w of φ

    def __init_subclass__(cls, name: str | None = None) -> None:
        super().__init_subclass__(name)
        if name is not None:
            MODELS[name] = cls

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        dim: int,
        generator: torch.Generator,
        *,
        margin: float = 24.0,
        norm: int = 1,
        inverse_relations: bool = False,
    ) -> None:
        super().__init__()
        self.num_relations = num_relations
        self.inverse_relations = inverse_relations
        self.dim = dim
        self.margin = margin
        self.range = (margin + 2.0) / dim
        if self.norms:
            self.similarity = f"l{norm}"

        def table(rows: int, width: int) -> nn.Parameter:
            values = torch.empty(rows, width * dim)
            return nn.Parameter(values.uniform_(-self.range, self.range, generator=generator))

        self.entity = table(num_entities, self.entity_width)  # (N, D)
        rows = 2 * num_relations if inverse_relations else num_relations
        self.relation = table(rows, self.relation_width)  # (R or 2R, D_r)
        self.register_parameter("similarity_weights", None)

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Query:
        """The query for (entity, relation, ?) where `direction` is "tail", else for (?, r, e).

        Args:
            entity: (B, D) rows of the given entities, as they are in the table.
            relation: (B, D_r) rows of the relations.
        """
        raise NotImplementedError

    def ask(self, entity: Tensor, relation: Tensor, direction: Direction) -> Query:
        """:meth:`query` by relations' ids (B,), with inverse relations if the model has them."""
        if self.inverse_relations and direction == "head":
            relation, direction = relation + self.num_relations, "tail"
        return self.query(entity, embedding(relation, self.relation), direction)

    def candidates(self) -> Tensor:
        """(N, D): the entities as φ takes them."""
        return self.entity

    def phi(self, query: Query) -> dict[str, Any]:
        """φ as keyword arguments of the public functions."""
        return {
            "similarity": self.similarity,
            "scale": query.scale,
            "similarity_weights": self.similarity_weights,
            "phase_scale": self.phase_scale,
        }

    def score(self, query: Query, candidates: Tensor) -> Tensor:
        """φ of each query with each candidate (C, D), as (B, C).

        Uses the operator of training, which is faster than torch.cdist. Memory is bounded by the
        result, or with the reference backend by B · ``_CANDIDATES`` · D.
        """
        first = torch.zeros(len(query.vector), dtype=torch.int64, device=candidates.device)
        ids = torch.arange(len(candidates), device=candidates.device).split(_CANDIDATES)
        arguments = self.phi(query)
        scores = [
            emu_scores(query.vector, candidates, first, i, mutation_rate=None, **arguments)
            for i in ids
        ]
        return torch.cat([s.negative for s in scores], dim=1)

    def scorer(self, graph: Graph) -> Score:
        candidates = self.candidates()
        return lambda given, relation, direction: self.score(
            self.ask(embedding(given, self.entity), relation, direction), candidates
        )


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite, without a temporary tensor of their number."""
    if not values.numel():
        return True
    low, high = values.detach().aminmax()
    return bool(low.isfinite() & high.isfinite())


@dataclass(frozen=True)
class ModelOptions:
    """model"""

    model: str = setting(
        "DistMult",
        "the scoring function; NBFNet changes defaults, see below",
        choices=SCORERS.keys(),
    )
    dim: int = setting(100, "dimension d", limit=AT_LEAST_1)
    norm: int = setting(
        1, "p of the distance's p-norm, in models that have the choice", choices=(1, 2)
    )
    margin: float = setting(
        24.0,
        "γ: initial values are in ±(γ+2)/d; selfadv's margin, with distances",
        limit=AT_LEAST_0,
    )
    inverse_relations: bool = setting(
        False, "give each relation an inverse, whose tails are predicted in place of heads"
    )
    init_entities: str | None = setting(
        None, "a file of entities' initial vectors, by name: .npz or a run's .safetensors"
    )
    freeze_entities: bool = setting(False, "do not train the vectors of init_entities")


class DotProduct(Model):
    """Models whose φ is the dot product."""

    similarity = "dot"
    regularization = 1e-5

    def score(self, query: Query, candidates: Tensor) -> Tensor:
        return query.vector @ candidates.T


class DistMult(DotProduct, name="DistMult"):
    """⟨h, r, t⟩ (Yang et al., 2015)."""

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Query:
        return Query(queries.distmult(entity, relation, direction))


class ComplEx(DotProduct, name="ComplEx"):
    """Re⟨h, r, conj(t)⟩ (Trouillon et al., 2016). A row holds d real parts, then d imaginary."""

    entity_width = 2
    relation_width = 2

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Query:
        return Query(queries.complex(entity, relation, direction))


class TransE(Model, name="TransE"):
    """−‖h + r − t‖, the 1-norm or the 2-norm (Bordes et al., 2013).

    As in RotatE's reference trainer: with its initial values, without the constraint ‖entity‖ = 1.
    """

    norms = (1, 2)
    regularization = 1e-3
    defaults: ClassVar[dict[str, Any]] = {"lr": 0.05}

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Query:
        return Query(queries.transe(entity, relation, direction))


class RotatE(Model, name="RotatE"):
    """−Σ_j |h_j e^{iθ_j} − t_j| (Sun et al., 2019). A row holds d real parts, then d imaginary.

    A relation holds its phases θ in units of (γ+2)/(dπ), so that they begin uniform in [−π, π].
    """

    similarity = "rotate"
    entity_width = 2
    regularization = 1e-3
    defaults: ClassVar[dict[str, Any]] = {"lr": 0.05}

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Query:
        return Query(queries.rotate(entity, relation * (math.pi / self.range), direction))


class PRotatE(Model, name="pRotatE"):
    """−w Σ_j |sin((h_j + r_j − t_j)/2)|, RotatE with equal moduli (Sun et al., 2019).

    All rows hold phases, in RotatE's units. w is learned and begins at (γ+2)/(2d), as in the
    authors' program. That takes the sine of the whole difference; here, as in the paper, it is of
    half, so that w/2 is the modulus that all entities share.
    """

    similarity = "protate"

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.phase_scale = math.pi / self.range
        self.similarity_weights = nn.Parameter(torch.tensor([0.5 * self.range]))

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Query:
        return Query(queries.protate(entity, relation, direction))


class HAKE(Model, name="HAKE"):
    """−w_p Σ_j |sin((h_p + r_p − t_p)_j/2)| − w_m ‖h_m ⊙ (|r_m| + r_b) − t_m ⊙ (1 − r_b)‖₂
    (Zhang et al., 2020).

    An entity's row holds d phases, then d moduli; a relation's d phases, d moduli r_m and d biases
    r_b, which are clamped to [−|r_m|, 1]. As in the authors' program, phases are in RotatE's units,
    r_m begins at 1, r_b at 0, and the weights, which are learned, at w_p = (γ+2)/(2d), w_m = 1.
    """

    similarity = "hake"
    entity_width = 2
    relation_width = 3
    # Ours: the paper gives no rate, and RotatE is the nearest model.
    defaults: ClassVar[dict[str, Any]] = {"lr": 0.05}

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.phase_scale = math.pi / self.range
        self.similarity_weights = nn.Parameter(torch.tensor([0.5 * self.range, 1.0]))
        _, modulus, bias = self.relation.detach().chunk(3, dim=-1)
        modulus.fill_(1.0)
        bias.zero_()

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Query:
        return Query(*queries.hake(entity, relation, direction))


class PairRE(Model, name="PairRE"):
    """−‖h ⊙ r_h − t ⊙ r_t‖ of normalized h and t, the 1-norm or the 2-norm (Chao et al., 2021).

    A relation holds r_h, then r_t. Entities are normalized to ‖·‖₂ = 1 before they are mutated (the
    norm of a mutated one is not 1). The kernels read rows of a table, so each step normalizes the
    whole table, which takes N·D more memory, and N·D more for its gradient. If B·K is many times N,
    as on FB15k-237, a step needs nearly every row anyway.
    """

    relation_width = 2
    norms = (1, 2)

    def query(self, entity: Tensor, relation: Tensor, direction: Direction) -> Query:
        return Query(*queries.pairre(normalize(entity, dim=-1), relation, direction))

    def candidates(self) -> Tensor:
        return normalize(self.entity, dim=-1)
