"""Node2Vec's loss with mutated negatives."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid
from torch_geometric.nn import Node2Vec

from emu_kernels import Mixup, emu_scores


def node2vec_loss(
    model: Node2Vec,
    pos_rw: Tensor,  # (P, C)
    neg_rw: Tensor,  # (P · n, C)
    *,
    mutation_rate: float | Tensor | Mixup | None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Node2Vec's loss (Grover and Leskovec, 2016) of its loader's walks, to replace ``model.loss``.

    The nodes of the random walks ``neg_rw`` are negatives of the first nodes of the real walks
    ``pos_rw``; each is mutated toward a node of that real walk (EMU; Takamoto et al., arXiv
    2504.03327). Without mutation this is ``model.loss``, if random walks begin where the real do.

    Args:
        model: a ``torch_geometric.nn.Node2Vec``; with ``sparse=True`` its gradient is sparse.
        pos_rw, neg_rw: int64 node ids, n negatives for each node, as from the model's loader.
        mutation_rate, seed, backend: as in :func:`emu_kernels.emu_scores`; None mutates nothing.

    Returns:
        The loss: a scalar.

    Raises:
        ValueError: walks of other shapes.
        IndexError: a node out of range.
    """
    count = model.num_negative_samples
    walks, size = pos_rw.shape
    if neg_rw.shape != (walks * count, size):
        raise ValueError(
            f"neg_rw: expected shape ({walks * count}, {size}), {count} random walks for each of "
            f"pos_rw, got {tuple(neg_rw.shape)}"
        )
    windows = 1 + model.walk_length + 1 - size  # of one walk; the loader stacks them
    negative = neg_rw[:, 1:].reshape(windows, count, -1, size - 1)
    start, positive = pos_rw[:, 0], pos_rw[:, 1:]
    scores = emu_scores(
        model.embedding(start).repeat_interleave(size - 1, dim=0),
        model.embedding.weight,
        positive.flatten(),
        negative.permute(0, 2, 3, 1).reshape(-1, count),
        mutation_rate=mutation_rate,
        seed=seed,
        sparse_grad=model.embedding.sparse,
        backend=backend,
    )
    return -logsigmoid(scores.positive).mean() - logsigmoid(-scores.mutated).mean()
