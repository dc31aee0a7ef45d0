"""The two losses as one writes them in PyTorch, at the fastest of the usual spellings.

On a CPU in fp32 the first spelling of a similarity is what took the least time, forward and
backward, of: for dot {product and sum, ``einsum``, ``bmm``}; for l1 and l2 {difference and sum,
``vector_norm``, ``cdist``}; for rotate {``vector_norm`` of the stacked parts, root of the sum of
squares, ``hypot``, complex ``abs``}; and of {``table[ids]``, ``embedding``, ``index_select``} for
the rows. Elsewhere :func:`fastest` tries them on the inputs at hand. The last spelling of each is
of pointwise operations and sums alone: every dtype has them, and a compiler can fuse them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bench.inputs import Inputs, Shape

Scores = Callable[[Tensor, Tensor], Tensor]  # (B, D), (B, K, D) -> (B, K)


def _dot_bmm(query: Tensor, candidates: Tensor) -> Tensor:
    return torch.bmm(candidates, query[:, :, None])[:, :, 0]


def _dot(query: Tensor, candidates: Tensor) -> Tensor:
    return (query[:, None] * candidates).sum(-1)


def _l1_cdist(query: Tensor, candidates: Tensor) -> Tensor:
    return -torch.cdist(query[:, None], candidates, p=1)[:, 0]


def _l1(query: Tensor, candidates: Tensor) -> Tensor:
    return -(query[:, None] - candidates).abs().sum(-1)


def _l2_cdist(query: Tensor, candidates: Tensor) -> Tensor:
    mode = "donot_use_mm_for_euclid_dist"
    return -torch.cdist(query[:, None], candidates, compute_mode=mode)[:, 0]


def _l2(query: Tensor, candidates: Tensor) -> Tensor:
    return -torch.linalg.vector_norm(query[:, None] - candidates, dim=-1)


def _rotate_hypot(query: Tensor, candidates: Tensor) -> Tensor:
    return -torch.hypot(*(query[:, None] - candidates).chunk(2, dim=-1)).sum(-1)


def _rotate(query: Tensor, candidates: Tensor) -> Tensor:
    re, im = (query[:, None] - candidates).chunk(2, dim=-1)
    return -(re * re + im * im).sqrt().sum(-1)


def _sines(query: Tensor, candidates: Tensor) -> Tensor:
    return -((query[:, None] - candidates) / 2).sin().abs().sum(-1)


def _hake(moduli: Scores) -> Scores:
    def scores(query: Tensor, candidates: Tensor) -> Tensor:
        (q_phase, q_modulus), (c_phase, c_modulus) = query.chunk(2, -1), candidates.chunk(2, -1)
        return _sines(q_phase, c_phase) + moduli(q_modulus, c_modulus)

    return scores


SPELLINGS: dict[str, tuple[Scores, ...]] = {
    "dot": (_dot_bmm, _dot),
    "l1": (_l1_cdist, _l1),
    "l2": (_l2_cdist, _l2),
    "rotate": (_rotate_hypot, _rotate),
    "hake": (_hake(_l2_cdist), _hake(_l2)),
    "protate": (_sines,),
}


_FASTEST: dict[Shape, Scores] = {}  # of what was tried in this process


def fastest(inputs: Inputs) -> Scores:
    """The spelling of these inputs' similarity that takes the least time on them."""
    spellings = SPELLINGS[inputs.similarity]
    if len(spellings) == 1 or (inputs.shape.device, inputs.shape.dtype) == ("cpu", "float32"):
        return spellings[0]
    if inputs.shape not in _FASTEST:
        _FASTEST[inputs.shape] = _tried(inputs, spellings)
    return _FASTEST[inputs.shape]


def _tried(inputs: Inputs, spellings: Sequence[Scores]) -> Scores:

    def seconds(scores: Scores) -> float:
        def step() -> None:
            loss = softmax_loss(
                inputs.query, inputs.table, inputs.positive, inputs.negative,
                scores=scores, sparse=True,
            )  # fmt: skip
            torch.autograd.grad(loss, (inputs.query, inputs.table))
            if inputs.query.is_cuda:
                torch.cuda.synchronize()

        try:
            step()  # finds what is missing for a dtype, and warms up
        except (NotImplementedError, RuntimeError):
            return float("inf")
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return min(reversed(spellings), key=seconds)


def _softmax_loss(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))


def softmax_loss(
    query: Tensor,  # (B, D)
    table: Tensor,  # (N, D)
    positive: Tensor,  # (B,)
    negative: Tensor,  # (B, K)
    *,
    scores: Scores = _dot_bmm,
    sparse: bool = False,
) -> Tensor:
    """Sampled-softmax cross-entropy, the mean over the batch."""
    ids = torch.cat([positive[:, None], negative], dim=1)
    return _softmax_loss(scores(query, functional.embedding(ids, table, sparse=sparse)))


def emu_loss(
    query: Tensor,  # (B, D)
    table: Tensor,  # (N, D)
    positive: Tensor,  # (B,)
    negative: Tensor,  # (B, K)
    *,
    mutation_rate: float,
    beta: float,
    alpha: float,
    scores: Scores = _dot_bmm,
    sparse: bool = False,
    mask: Tensor | None = None,  # (B, K, D) bool, drawn where None
) -> Tensor:
    """L_emu + α · L_van with masks from ``torch.rand``, the mean over the batch."""
    z_pos = functional.embedding(positive, table, sparse=sparse)  # (B, D)
    z_neg = functional.embedding(negative, table, sparse=sparse)  # (B, K, D)
    if mask is None:
        mask = torch.rand(z_neg.shape, device=z_neg.device) < mutation_rate
    mutated = torch.where(mask, z_pos[:, None, :], z_neg)
    s_pos = scores(query, z_pos[:, None])
    vanilla = _softmax_loss(torch.cat([s_pos, scores(query, z_neg)], dim=1))
    logits = torch.cat([s_pos, scores(query, mutated)], dim=1)
    labels = torch.full_like(logits, beta)
    labels[:, 0] = 1
    # Labels as class probabilities need not sum to one: −Σ_k label_k log p_k.
    uls = functional.cross_entropy(logits, labels) / negative.shape[1]
    return uls + alpha * vanilla
