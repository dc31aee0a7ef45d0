"""An entity table larger than one machine: TorchRec holds its rows, our kernels compute the loss.

:class:`ShardedEntities` spreads the rows over the processes of a ``torch.distributed`` group. A
step fetches the rows of its batch, computes any loss of this package with them, and sends the
gradients back to the rows' owners, where TorchRec's fused optimizer steps the rows. Relations are
few: each process has all of them. See docs/distributed.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from emu_kernels import emu_scores, validate
from emu_kernels.integrations._require import require
from emu_kernels.negatives import generator
from emu_kernels.values import check_ids

MINIMUM = (1, 6)  # for torch 2.11


def _require_pair() -> None:
    """Raise an error that names the right TorchRec and FBGEMM, unless these are installed.

    TorchRec 1.n and FBGEMM 1.n are built for torch 2.(n + 5). FBGEMM's operators are missing or
    crash with another torch.
    """
    require("torchrec", MINIMUM, extra="torchrec")
    minor = re.match(r"2\.(\d+)", torch.__version__)
    if minor is None:
        return
    wanted = f"1.{int(minor[1]) - 5}"
    fbgemm = "fbgemm-gpu"
    for name in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        fbgemm = name
    for name in ("torchrec", fbgemm):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if not re.match(rf"{re.escape(wanted)}(\.|$)", found):
            raise ImportError(
                f"torch {torch.__version__} goes with torchrec {wanted} and {fbgemm} {wanted}, but "
                f"{name} {found} is installed: pip install 'torchrec=={wanted}.*' "
                f"'{fbgemm}=={wanted}.*' (without a GPU see docs/distributed.md)",
                name=name,
            )


_require_pair()

from torch.distributed.optim.apply_optimizer_in_backward import (  # noqa: E402
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.distributed.comm_ops import get_gradient_division  # noqa: E402
from torchrec.distributed.embedding import EmbeddingCollectionSharder  # noqa: E402
from torchrec.distributed.shard import shard  # noqa: E402
from torchrec.distributed.sharding_plan import row_wise  # noqa: E402
from torchrec.distributed.types import ShardingEnv  # noqa: E402
from torchrec.modules.embedding_configs import EmbeddingConfig  # noqa: E402
from torchrec.modules.embedding_modules import EmbeddingCollection  # noqa: E402
from torchrec.optim import RowWiseAdagrad  # noqa: E402
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402

__all__ = ["OPTIMIZERS", "Rows", "ShardedEntities"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "Adagrad": torch.optim.Adagrad,
    "RowwiseAdagrad": RowWiseAdagrad,
    "SGD": torch.optim.SGD,
}
"""Optimizers by the trainer's names: a sum of squares for each component, for each row, or none."""

_NAME = "entity"
_BLOCK = 1 << 14  # rows whose initial values are drawn at once
_CANDIDATES = 256  # scored at once: a tile of so many rows stays in a CPU's cache
_SCORES = 1 << 26  # of all processes' queries with one process's rows, held at once: 256 MiB


class Rows(NamedTuple):
    """What :meth:`ShardedEntities.fetch` returns."""

    table: Tensor
    """(U, D) the rows, with gradient: the ``table`` of a loss."""
    entity: Tensor
    """(U,) int64: the entity of each row, ascending. ``log_q[entity]`` is the rows' log q."""
    ids: tuple[Tensor, ...]
    """For each given tensor of entities, one of the same shape with their rows in ``table``."""


class ShardedEntities:
    """An embedding table (N, D) whose rows are spread over a group's processes, and its optimizer.

    All processes make one, with the same arguments, and call its methods together. A step::

        rows = entities.fetch(given, positive, negative)
        given, positive, negative = rows.ids
        query = queries.distmult(rows.table[given], relation[r])
        loss = fused_emu_loss(
            query, rows.table, positive, negative, row_offset=entities.rank * len(positive), ...
        )
        entities.backward(loss, [relation], weight=len(positive))
        optimizer.step()  # of the relations; the rows have been stepped by their owners

    The numbers are those of one process with the joint batch, in the order of the ranks, if
    ``seed`` is the same everywhere and ``row_offset`` is the number of rows on lower ranks.

    Args:
        num_entities: N, at least the number of processes.
        dim: D, a multiple of 4, as FBGEMM requires.
        optimizer: a name of :data:`OPTIMIZERS`, or a class for which FBGEMM has a fused kernel; it
            is given to torch's ``_apply_optimizer_in_backward``.
        lr: its learning rate; the attribute :attr:`lr` changes it.
        eps: added to Adagrad's root; the default is torch's.
        bound: initial values are uniform in ±``bound``, the same for any number of processes.
        seed: of the initial values.
        device: where the process has its rows; None is "cpu".
        plan: how rows are placed, from ``torchrec.distributed.sharding_plan``; None is
            ``row_wise()``. ``row_wise(compute_kernel="fused_uvm_caching")`` keeps the rows in host
            memory and a cache of them on the GPU. Plans that split columns are refused.
        fused_params: FBGEMM's own settings, as TorchRec's sharders take them.
        group: the processes; None is all of them.

    Attributes:
        rank, processes: this process's rank in the group, and the number of processes.

    Raises:
        ValueError: an argument that does not fit.
        RuntimeError: no process group; TorchRec's gradient division is off.
    """

    def __init__(
        self,
        num_entities: int,
        dim: int,
        *,
        optimizer: str | type[torch.optim.Optimizer] = "Adagrad",
        lr: float = 0.1,
        eps: float = 1e-10,
        bound: float = 0.1,
        seed: int = 0,
        device: torch.device | str | None = None,
        plan: Callable[..., Any] | None = None,
        fused_params: dict[str, Any] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "there is no process group: call torch.distributed.init_process_group first, in "
                "each process of torchrun"
            )
        if not get_gradient_division():
            raise RuntimeError(
                "torchrec.distributed.comm_ops.set_gradient_division(False) was called: gradients "
                "would be sums over the processes, and means are needed"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank = dist.get_rank(self.group)
        self.processes = dist.get_world_size(self.group)
        self.num_entities, self.dim = num_entities, dim
        if num_entities < self.processes:
            raise ValueError(
                f"num_entities: expected one for each of {self.processes} processes, "
                f"got {num_entities}"
            )
        if dim < 4 or dim % 4:
            raise ValueError(f"dim: expected a multiple of 4, got {dim}")
        if isinstance(optimizer, str):
            validate.one_of("optimizer", optimizer, tuple(OPTIMIZERS))
            optimizer = OPTIMIZERS[optimizer]
        options = {"lr": lr} if optimizer is torch.optim.SGD else {"lr": lr, "eps": eps}
        self.device = torch.device("cpu" if device is None else device)
        table = EmbeddingConfig(
            name=_NAME, num_embeddings=num_entities, embedding_dim=dim, feature_names=[_NAME]
        )
        collection = EmbeddingCollection(tables=[table], device=torch.device("meta"))
        apply_optimizer_in_backward(optimizer, collection.parameters(), options)
        self.collection = shard(
            collection,
            {_NAME: plan or row_wise()},
            env=ShardingEnv.from_process_group(self.group),
            device=self.device,
            sharder=EmbeddingCollectionSharder(fused_params=fused_params),
        )
        self._optimizer = self.collection.fused_optimizer
        if self.local.shape[1] != dim:
            raise ValueError("plan: expected whole rows, got one that splits columns")
        self._draw(bound, seed)

    def _draw(self, bound: float, seed: int) -> None:
        """Fill the rows, block by block; each block has a generator of its own."""

        def rows(first: int, last: int) -> Tensor:
            blocks = []
            for block in range(first // _BLOCK, -(-last // _BLOCK)):
                draws = generator(torch.device("cpu"), seed, "init", block)
                values = torch.empty(_BLOCK, self.dim).uniform_(-bound, bound, generator=draws)
                start = block * _BLOCK
                blocks.append(values[max(0, first - start) : last - start])
            return torch.cat(blocks)

        self.fill(rows)

    @property
    def local(self) -> Tensor:
        """(n, D) this process's rows, not a copy: the optimizer changes them."""
        return self._shard().tensor.detach()

    @property
    def first(self) -> int:
        """The entity of the first of the process's rows; the others follow it."""
        return int(self._shard().metadata.shard_offsets[0])

    def _shard(self) -> Any:
        shards = self.collection.state_dict()[f"embeddings.{_NAME}.weight"].local_shards()
        if len(shards) != 1:
            raise ValueError("plan: expected some rows on each process, got one with none")
        return shards[0]

    @torch.no_grad()
    def fill(self, rows: Callable[[int, int], Tensor]) -> None:
        """Set the values of the process's rows.

        Args:
            rows: given the first entity and the one after the last, returns their (n, D) values.
        """
        local, first = self.local, self.first
        for start in range(0, len(local), _BLOCK):
            part = local[start : start + _BLOCK]
            part.copy_(rows(first + start, first + start + len(part)))

    def part(self, count: int) -> slice:
        """This process's part of ``count`` rows of a joint batch, which are split evenly."""
        first, last = (at * count // self.processes for at in (self.rank, self.rank + 1))
        return slice(first, last)

    @property
    def lr(self) -> float:
        """The rows' learning rate; a new value holds from the next :meth:`fetch` on."""
        return float(self._optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = value
        self._optimizer.step()  # hands the rate to the kernels, and moves nothing

    def fetch(self, *entities: Tensor) -> Rows:
        """The rows of a step's entities, each once.

        Args:
            entities: int64 tensors of any shape, the same number of them on each process; −1 is
                padding.

        Raises:
            IndexError: an id out of range.
            TypeError: ids that are not integers.
        """
        for ids in entities:
            validate.integer("entities", ids)
        flat = torch.cat([ids.reshape(-1) for ids in entities]).to(self.device, torch.int64)
        entity, place = flat.unique(return_inverse=True)
        if len(entity) and entity[0] < 0:
            if entity[0] < -1:
                raise IndexError(f"entities: expected ids of at least -1, got {int(entity[0])}")
            entity, place = entity[1:], place - 1
        if len(entity) and entity[-1] >= self.num_entities:
            raise IndexError(
                f"entities: expected ids below {self.num_entities}, got {int(entity[-1])}"
            )
        features = KeyedJaggedTensor(
            keys=[_NAME],
            values=entity,
            lengths=torch.tensor([len(entity)], dtype=torch.int64, device=self.device),
        )
        table = self.collection(features)[_NAME].values()
        places = place.split([ids.numel() for ids in entities])
        return Rows(
            table,
            entity,
            tuple(at.view(ids.shape) for at, ids in zip(places, entities, strict=True)),
        )

    def backward(
        self, loss: Tensor, replicated: Iterable[Tensor] = (), *, weight: float | Tensor = 1.0
    ) -> Tensor:
        """Differentiate the mean of all processes' losses; step the rows that were fetched.

        Args:
            loss: () this process's loss, from one or more :meth:`fetch`, each differentiated once.
            replicated: parameters that all processes have the same, such as relations: their
                gradients become those of the mean. Step them afterwards.
            weight: of this process's loss in the mean: the number of rows it is the mean of, or the
                sum of their ``sample_weight``. With equal weights it is the plain mean.

        Returns:
            () the mean, detached, the same on all processes.
        """
        if not isinstance(weight, Tensor) and validate.finite("weight", weight) < 0:
            raise ValueError(f"weight: expected a number of at least 0, got {weight}")
        value = torch.as_tensor(weight, dtype=torch.float64, device=self.device)
        whole = value.clone()
        dist.all_reduce(whole, group=self.group)
        # Where all weights are 0, the loss is 0.
        share = (value * self.processes / whole.clamp(min=torch.finfo(whole.dtype).tiny)).to(loss)
        loss = loss * share
        loss.backward()
        replicated = list(replicated)
        for parameter in replicated:
            if parameter.grad is None:  # not used here, but perhaps in other processes
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad.flatten() for p in replicated if p.grad is not None]
        sums = torch.cat([*gradients, loss.detach().flatten()])
        dist.all_reduce(sums, group=self.group)
        sums /= self.processes
        sizes = [gradient.numel() for gradient in gradients]
        for parameter, mean in zip(replicated, sums[:-1].split(sizes), strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(mean.view_as(parameter))
        return sums[-1]

    @torch.no_grad()
    def ranks(
        self,
        query: Tensor,  # (Q, D)
        positive: Tensor,  # (Q,)
        known: tuple[Tensor, Tensor] | None = None,  # each (P,)
        *,
        similarity: str = "dot",
        scale: Tensor | None = None,  # (Q, D), or (Q, D/2)
        similarity_weights: Tensor | None = None,
        phase_scale: float = 1.0,
    ) -> Tensor:
        """The rank of each query's positive among all entities, without gathering the table.

        Each process scores its own rows for all processes' queries, and counts those that beat the
        positive. Ties count as the mean of the best and the worst rank.

        Args:
            query: this process's queries, of the same dtype as the rows. Their number may differ
                from process to process, and be 0. 256 MiB of scores are held at once.
            positive: their true entities.
            known: (query, entity) pairs that are true too, each once, to be left out (the filtered
                setting). The positives' own pairs may be among them.
            similarity, scale, similarity_weights, phase_scale: as in
                :func:`emu_kernels.fused_emu_loss`.

        Returns:
            (Q,) float64, from 1.

        Raises:
            ValueError: a score that is not finite, on all processes.
            IndexError: an id out of range, on all processes.
        """
        longest = -(-self.num_entities // self.processes)
        chunk = max(1, _SCORES // longest // self.processes)
        counts = []
        steps = torch.tensor(-(-len(query) // chunk), device=self.device)
        dist.all_reduce(steps, op=dist.ReduceOp.MAX, group=self.group)
        for start in range(0, int(steps) * chunk, chunk):
            at = slice(start, start + chunk)
            pairs = None
            if known is not None:
                row, entity = known
                inside = (row >= start) & (row < start + chunk)
                pairs = torch.stack([row[inside] - start, entity[inside]], dim=1)
            counts.append(
                self._rank_chunk(
                    query[at],
                    positive[at],
                    pairs,
                    None if scale is None else scale[at],
                    similarity=similarity,
                    similarity_weights=similarity_weights,
                    phase_scale=phase_scale,
                )
            )
        return torch.cat(counts) if counts else positive.new_zeros(0, dtype=torch.float64)

    def _rank_chunk(
        self,
        query: Tensor,
        positive: Tensor,
        pairs: Tensor | None,  # (P, 2)
        scale: Tensor | None,
        **phi: Any,
    ) -> Tensor:
        queries, numbers = self.gather(query)
        before = sum(numbers[: self.rank])
        target = self.gather(positive)[0]
        check_ids("positive", target, rows=self.num_entities, lowest=0)  # on all processes alike
        whole_scale = None if scale is None else self.gather(scale)[0]
        scores = _scores(queries, self.local, whole_scale, **phi)  # (all Q, n)
        place = target - self.first
        here = (place >= 0) & (place < scores.shape[1])
        own = here.nonzero()[:, 0]
        true = scores.new_zeros(len(target), dtype=torch.float64)
        true[own] = scores[own, place[own]].double()
        dist.all_reduce(true, group=self.group)  # one process adds a value, the others 0

        exact = true.to(scores.dtype)[:, None]
        better = (scores > exact).sum(1).double()
        as_good = (scores >= exact).sum(1).double()
        odd = (~scores.isfinite()).sum().double()
        better_known, as_good_known = torch.zeros_like(better), torch.zeros_like(as_good)
        if pairs is not None:
            shifted = pairs + pairs.new_tensor([before, 0])
            row, entity = self.gather(shifted)[0].T
            check_ids("known", entity, rows=self.num_entities, lowest=0)
            mine = (entity >= self.first) & (entity < self.first + scores.shape[1])
            mine &= entity != target[row]  # the positive is counted below, listed as known or not
            row, entity = row[mine], entity[mine] - self.first
            found = scores[row, entity]
            better_known.index_add_(0, row, (found > exact[row, 0]).double())
            as_good_known.index_add_(0, row, (found >= exact[row, 0]).double())
        sums = torch.cat([better - better_known, as_good - as_good_known, odd[None]])
        dist.all_reduce(sums, group=self.group)
        if sums[-1]:
            raise ValueError("query: a score is not finite, so its rank would mean nothing")
        better, as_good = sums[:-1].view(2, -1)[:, before : before + len(query)]
        # Optimistic rank 1 + better; pessimistic rank as_good, which counts the positive.
        return (1.0 + better + as_good) / 2.0

    def gather(self, part: Tensor) -> tuple[Tensor, list[int]]:
        """All processes' parts (n, ...) in the order of ranks, and their sizes n."""
        size = torch.tensor([len(part)], device=self.device)
        sizes = [torch.empty_like(size) for _ in range(self.processes)]
        dist.all_gather(sizes, size, group=self.group)
        numbers = [int(n) for n in sizes]
        padded = part.new_zeros(max(numbers), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in numbers]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([x[:n] for x, n in zip(parts, numbers, strict=True)]), numbers

    def state_dict(self) -> dict[str, Any]:
        """Rows and optimizer, by shards: what ``torch.distributed.checkpoint`` saves and loads.

        It takes this object itself: ``save({"entities": entities, ...}, checkpoint_id=folder)``
        writes each process's part, and ``load`` of the same reads it, on any number of processes.
        The learning rate is not in it.
        """
        return {"rows": self.collection.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a :meth:`state_dict` of the same number of processes."""
        self.collection.load_state_dict(state["rows"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._optimizer.step()  # hands the learning rate to the kernels, as in lr


def _scores(query: Tensor, table: Tensor, scale: Tensor | None, **phi: Any) -> Tensor:
    """(Q, n) φ of each query with each row, without gradient."""
    if phi["similarity"] == "dot":
        return query.to(table.dtype) @ table.T
    first = torch.zeros(len(query), dtype=torch.int64, device=table.device)
    ids = torch.arange(len(table), device=table.device).split(_CANDIDATES)
    parts = [
        emu_scores(query, table, first, i, mutation_rate=None, scale=scale, **phi).negative
        for i in ids
    ]
    return torch.cat(parts, dim=1)
