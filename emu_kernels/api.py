"""The public functions: check the arguments, resolve the backend, dispatch. Nothing else.

What they compute is specified by :mod:`emu_kernels.reference`, which masks they draw by
:mod:`emu_kernels.mask`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from emu_kernels import backends, ops, reference, validate
from emu_kernels.backends.base import Batch
from emu_kernels.mutation import NONE, Mixup, Mutation, parse

__all__ = [
    "EmuScores",
    "emu_mutate",
    "emu_scores",
    "fused_emu_loss",
    "fused_softmax_loss",
    "uls_cross_entropy",
]


class EmuScores(NamedTuple):
    """What :func:`emu_scores` returns."""

    positive: Tensor
    """(B,) score of each row's positive."""
    negative: Tensor
    """(B, K) scores of the negatives as they are; −inf where padding."""
    mutated: Tensor
    """(B, K) scores of the mutated negatives; −inf where padding. ``negative`` without mutation."""


def fused_emu_loss(
    query: Tensor,  # (B, D)
    table: Tensor,  # (N, D)
    positive: Tensor,  # (B,)
    negative: Tensor,  # (G, K) or (K,)
    *,
    similarity: str = "dot",
    mutation_rate: float | Tensor | Mixup,
    beta: float | Tensor,
    alpha: float | Tensor,
    scale: Tensor | None = None,  # (B, D), or (B, D/2)
    similarity_weights: Tensor | None = None,
    phase_scale: float = 1.0,
    sample_weight: Tensor | None = None,  # (B,)
    mask_unit: str = "component",
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    reduction: str = "mean",
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""EMU loss L_emu + α · L_van of sampled negatives (Takamoto et al., arXiv 2504.03327).

    Each negative z⁻_k is mutated toward the positive z⁺ by a random mask λ_k, a share
    ``mutation_rate`` of whose components is 1: ẑ_k = λ_k ⊙ z⁺ + (1 − λ_k) ⊙ z⁻_k. With
    ŝ_k = φ(query, ẑ_k), s⁺ = φ(query, z⁺), s⁻_k = φ(query, z⁻_k), for each row::

        L_emu = (1/K) · [(l̂ − s⁺) + β Σ_k (l̂ − ŝ_k)]     l̂ = logsumexp(s⁺, ŝ_1..ŝ_K)
        L_van = l − s⁺                                     l = logsumexp(s⁺, s⁻_1..s⁻_K)

    Nothing of size B·K·D is allocated; gradients flow into ``query``, ``table`` (into the positive
    through every mutated component too), ``scale`` and ``similarity_weights`` and have no second
    derivative, except on ``reference``.

    Args:
        query: (B, D) fp32, bf16, fp16 or fp64: all of the model except the entity being corrupted.
            Taken in fp32, whatever autocast says.
        table: (N, D) the entity embeddings, fp32, bf16, fp16 or (with an fp64 query) fp64; rows may
            be strided. Never cast as a whole.
        positive: (B,) integer row ids in [0, N).
        negative: (G, K) integer row ids in [0, N), or −1 for padding, which takes no part (K above
            is then the row's count of real negatives; a row without any has loss 0). G divides B: G
            = B is a set for each row, G = 1 (or shape (K,)) one for the batch, between them one for
            each block of B/G rows.
        similarity: φ(q, c) of query and candidate, with a, w, κ of the arguments below:

            - "dot": Σ_j q_j c_j (DistMult, ComplEx)
            - "l1": −Σ_j |q_j − a_j c_j| (TransE, PairRE)
            - "l2": −‖q − a ⊙ c‖₂
            - "rotate": −Σ_j |q_j − c_j|, complex numbers, re‖im (RotatE)
            - "hake": −w_0 Σ_j |sin((q_j − c_j) κ/2)| of the phases − w_1 ‖q − a ⊙ c‖₂ of the
              moduli, phase‖modulus (HAKE)
            - "protate": −w_0 Σ_j |sin((q_j − c_j) κ/2)| of phases (pRotatE)

            Where a distance is 0 its subgradient is 0.
        mutation_rate: in [0, 1], effective in steps of 1/256
            (:func:`emu_kernels.mask.effective_rate`); a tensor holds one rate a component (D,), or
            a pair (D/2,), and gets no gradient; a :class:`Mixup` mixes instead.
        beta: the label β ≥ 0 of a mutated negative under unbounded label smoothing; a number, or a
            one-element tensor (for schedules), which gets no gradient.
        alpha: the weight α ≥ 0 of the vanilla term; likewise.
        scale: a, (B, D) for "l1" and "l2", (B, D/2) for "hake"; None is ones.
        similarity_weights: w, (2,) for "hake", (1,) for "protate"; None is ones.
        phase_scale: κ, for "hake" and "protate": π over the range that the phases' embeddings have.
        sample_weight: (B,) weight of each row's loss, not differentiated.
        mask_unit: "component", or "pair": components j and D/2 + j, the parts of a complex number
            in "rotate" (and in ComplEx's "dot"), are mutated together.
        seed: of the masks: an int in [0, 2^63), a one-element int64 tensor on the table's device,
            or None to draw from torch's default generator of that device. Under torch.compile a
            tensor or None never recompiles; ints do once, at the second value.
        row_offset: global index of row 0, so that sharding a batch changes no mask.
        reduction: "mean" (divides by the sum of ``sample_weight``; 0 for an empty batch), "sum" or
            "none".
        sparse_grad: give ``table`` a sparse (COO) gradient of its touched rows, each once and in
            order, with no N·D buffer. Eager only.
        backend: a name of :data:`emu_kernels.backends.NAMES`, or None for the fastest
            (:func:`emu_kernels.backends.default_backend`).

    Returns:
        The loss: a scalar, or (B,) for reduction "none"; fp32, or fp64 for fp64 inputs. NaN where
        an embedding or a score is not finite.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit.
        IndexError: an id out of range.
        RuntimeError: a backend that cannot run here.
    """
    loss, _ = loss_and_terms(
        query,
        table,
        positive,
        negative,
        similarity=similarity,
        mutation=("mutation_rate", mutation_rate, mask_unit),
        beta=beta,
        alpha=alpha,
        scale=scale,
        similarity_weights=similarity_weights,
        phase_scale=phase_scale,
        sample_weight=sample_weight,
        seed=seed,
        row_offset=row_offset,
        reduction=reduction,
        sparse_grad=sparse_grad,
        backend=backend,
    )
    return loss


def fused_softmax_loss(
    query: Tensor,  # (B, D)
    table: Tensor,  # (N, D)
    positive: Tensor,  # (B,)
    negative: Tensor,  # (G, K) or (K,)
    *,
    similarity: str = "dot",
    scale: Tensor | None = None,  # (B, D), or (B, D/2)
    similarity_weights: Tensor | None = None,
    phase_scale: float = 1.0,
    sample_weight: Tensor | None = None,  # (B,)
    reduction: str = "mean",
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Sampled-softmax cross-entropy: L_van of :func:`fused_emu_loss` alone, by the same kernels.

    Arguments, result and errors are those of :func:`fused_emu_loss`, less the mutation.
    """
    loss, _ = loss_and_terms(
        query,
        table,
        positive,
        negative,
        similarity=similarity,
        mutation=None,
        beta=0.0,
        alpha=1.0,
        scale=scale,
        similarity_weights=similarity_weights,
        phase_scale=phase_scale,
        sample_weight=sample_weight,
        seed=None,
        row_offset=0,
        reduction=reduction,
        sparse_grad=sparse_grad,
        backend=backend,
    )
    return loss


def emu_scores(
    query: Tensor,  # (B, D)
    table: Tensor,  # (N, D)
    positive: Tensor,  # (B,)
    negative: Tensor,  # (G, K) or (K,)
    *,
    similarity: str = "dot",
    mutation: float | Tensor | Mixup | None,
    margin: float = 0.0,
    scale: Tensor | None = None,  # (B, D), or (B, D/2)
    similarity_weights: Tensor | None = None,
    phase_scale: float = 1.0,
    mask_unit: str = "component",
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> EmuScores:
    """Scores of positives, negatives and mutated negatives, for losses of your own.

    The backward pass is fused for any upstream gradients and allocates nothing of size B·K·D.

    Args:
        mutation: the mutation rate in [0, 1], rates or a :class:`Mixup`, as ``mutation_rate``; None
            mutates nothing, so that ``mutated`` is ``negative`` itself, at no cost.
        margin: γ, added to every score.

    The other arguments and the errors are those of :func:`fused_emu_loss`.

    Returns:
        EmuScores: positive (B,), negative (B, K), mutated (B, K), fp32 (fp64 for fp64 inputs). A
        padding id has score −inf and no gradient.
    """
    validate.batch(
        query,
        table,
        positive,
        negative,
        similarity=similarity,
        scale=scale,
        similarity_weights=similarity_weights,
        phase_scale=phase_scale,
    )
    mutated = NONE
    if mutation is not None:
        mutated = parse("mutation", mutation, mask_unit, query.shape[1], table.device)
    validate.seed(seed, table.device)
    validate.row_offset(row_offset, query.shape[0])
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise TypeError(f"margin: expected a number, got {type(margin).__name__}")
    name = backends.resolve(backend, table.device)
    batch = _canonical(
        query, table, scale, similarity_weights, positive, negative,
        _seed_tensor(0 if mutation is None else seed, table.device), row_offset, mutated,
        similarity, phase_scale,
    )  # fmt: skip
    scores: tuple[Tensor | None, ...]
    if name == backends.REFERENCE:
        scores, poison = _reference_scores(batch, sparse_grad)
        if poison is not None:
            scores = tuple(s if s is None else (s.T * poison).T for s in scores)
    elif _wants_grad(*batch[:4]):
        scores = ops.Scores.apply(sparse_grad, *batch, name)
    else:
        scores = ops.OPS.scores_forward(*batch, name)
    s_pos, s_neg, s_mut = (s + margin if margin and s is not None else s for s in scores)
    assert s_pos is not None
    assert s_neg is not None
    return EmuScores(s_pos, s_neg, s_neg if mutation is None or s_mut is None else s_mut)


def emu_mutate(
    positive: Tensor,  # (B, D)
    negative: Tensor,  # (B, K, D)
    *,
    mutation_rate: float | Tensor,
    mask_unit: str = "component",
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Mutated negatives ẑ = λ ⊙ z⁺ + (1 − λ) ⊙ z⁻ themselves, for scorers that are black boxes.

    The masks are those of :func:`fused_emu_loss` for the same seed; they are never stored.

    Args:
        positive: (B, D) embeddings, fp32, bf16, fp16 or fp64.
        negative: (B, K, D) embeddings of the same dtype.
        mutation_rate, mask_unit, seed, row_offset, backend: as in :func:`fused_emu_loss`.

    Returns:
        (B, K, D) in the inputs' dtype, differentiable in both inputs any number of times.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fused_emu_loss`.
    """
    positive = validate.tensor("positive", positive)
    negative = validate.tensor("negative", negative)
    validate.dims("positive", positive, (2,), "(B, D)")
    validate.dims("negative", negative, (3,), "(B, K, D)")
    validate.floating("positive", positive)
    validate.floating("negative", negative)
    validate.same_device("positive", positive, negative=negative)
    rows, dim = positive.shape
    if negative.dtype != positive.dtype:
        raise TypeError(f"negative: expected {positive.dtype} like positive, got {negative.dtype}")
    if negative.shape[0] != rows or negative.shape[2] != dim:
        raise ValueError(
            f"negative: expected shape ({rows}, K, {dim}) to go with positive, "
            f"got {tuple(negative.shape)}"
        )
    if isinstance(mutation_rate, Mixup):
        raise TypeError("mutation_rate: expected a rate or a tensor of rates, got Mixup")
    mutation = parse("mutation_rate", mutation_rate, mask_unit, dim, positive.device)
    validate.seed(seed, positive.device)
    validate.row_offset(row_offset, rows)
    name = backends.resolve(backend, positive.device)
    seed = _seed_tensor(seed, positive.device)
    if name == backends.REFERENCE:
        return reference.mutate(positive, negative, mutation, seed=seed, row_offset=row_offset)
    out: Tensor = ops.Mutate.apply(
        positive, negative, seed, mutation.thresholds, row_offset, mutation.kind,
        mutation.threshold, name,
    )  # fmt: skip
    return out


def uls_cross_entropy(
    positive_score: Tensor,  # (B,)
    negative_score: Tensor,  # (B, K)
    *,
    beta: float | Tensor,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy under unbounded label smoothing: L_emu of given scores (arXiv 2504.03327).

    The positive has label 1, each negative the label β, not normalised to sum to one::

        L = (1/K) · [(l̂ − s⁺) + β Σ_k (l̂ − ŝ_k)]     l̂ = logsumexp(s⁺, ŝ_1..ŝ_K)

    Args:
        positive_score: (B,) s⁺, any floating dtype; computed in fp32 (fp64 for fp64).
        negative_score: (B, K) ŝ; −inf is padding and takes no part.
        beta: ≥ 0, a number or a one-element tensor.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss: a scalar, or (B,) for "none".

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    positive_score = validate.tensor("positive_score", positive_score)
    negative_score = validate.tensor("negative_score", negative_score)
    validate.dims("positive_score", positive_score, (1,), "(B,)")
    validate.dims("negative_score", negative_score, (2,), "(B, K)")
    validate.floating("positive_score", positive_score)
    validate.floating("negative_score", negative_score)
    validate.same_precision("positive_score", positive_score, "negative_score", negative_score)
    validate.same_device("positive_score", positive_score, negative_score=negative_score)
    if negative_score.shape[0] != positive_score.shape[0]:
        raise ValueError(
            f"negative_score: expected {positive_score.shape[0]} rows like positive_score, "
            f"got shape {tuple(negative_score.shape)}"
        )
    validate.coefficient("beta", beta)
    validate.one_of("reduction", reduction, validate.REDUCTIONS)
    dtype = reference.accumulation_dtype(positive_score.dtype)
    positive_score, negative_score = positive_score.to(dtype), negative_score.to(dtype)
    beta = _reference_coefficient("beta", beta, positive_score)
    rows = reference.uls_rows(positive_score, negative_score, beta)
    return reference.reduce(rows, None, reduction)


def loss_and_terms(
    query: Tensor,
    table: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    similarity: str,
    mutation: tuple[str, object, object] | None,
    beta: float | Tensor,
    alpha: float | Tensor,
    scale: Tensor | None,
    similarity_weights: Tensor | None,
    phase_scale: float,
    sample_weight: Tensor | None,
    seed: int | Tensor | None,
    row_offset: int,
    reduction: str,
    sparse_grad: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The loss, and detached (2,) weighted means of its terms L_emu and L_van, for logging.

    ``mutation``: the rate argument's name and value and the mask's unit; None is the vanilla term
    alone.
    """
    validate.batch(
        query,
        table,
        positive,
        negative,
        similarity=similarity,
        scale=scale,
        similarity_weights=similarity_weights,
        phase_scale=phase_scale,
    )
    validate.sample_weight(sample_weight, query)
    validate.coefficient("beta", beta)
    validate.coefficient("alpha", alpha)
    validate.one_of("reduction", reduction, validate.REDUCTIONS)
    validate.seed(seed, table.device)
    validate.row_offset(row_offset, query.shape[0])
    mutated = NONE
    if mutation is not None:
        argument, value, unit = mutation
        mutated = parse(argument, value, unit, query.shape[1], table.device)
    name = backends.resolve(backend, table.device)
    # Without mutation no mask is drawn, and torch's generator is left alone.
    seed = _seed_tensor(0 if mutation is None else seed, table.device)
    batch = _canonical(
        query, table, scale, similarity_weights, positive, negative, seed, row_offset, mutated,
        similarity, phase_scale,
    )  # fmt: skip
    if sample_weight is not None:
        sample_weight = sample_weight.detach().to(batch.query.dtype).contiguous()
    if name == backends.REFERENCE:
        scored, poison = _reference_scores(batch, sparse_grad)
        beta = _reference_coefficient("beta", beta, batch.query)
        alpha = _reference_coefficient("alpha", alpha, batch.query)
        terms, rows = reference.loss_rows(scored, batch.negative, beta=beta, alpha=alpha)
        if poison is not None:
            rows = rows * poison
        means = [reference.reduce(term, sample_weight, "mean") for term in terms.detach()]
        return reference.reduce(rows, sample_weight, reduction), torch.stack(means)
    coefficients = None
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        coefficients = torch.stack([_scalar(beta, batch.query), _scalar(alpha, batch.query)])
        beta = alpha = 0.0
    arguments = (
        *batch, name, float(beta), float(alpha), coefficients, sample_weight, reduction
    )  # fmt: skip
    if _wants_grad(*batch[:4]):
        loss, terms = ops.Loss.apply(sparse_grad, len(batch) + 1, *arguments)
    else:
        loss, terms, *_ = ops.OPS.loss_forward(*arguments, False)
    return loss, terms


def _reference_scores(batch: Batch, sparse: bool) -> tuple[reference.Scores, Tensor | None]:
    """The specification's scores; on a GPU a (B,) factor too, NaN where an id is out of range."""
    positive, negative, poison = _reference_ids(batch.positive, batch.negative, batch.table)
    scored = reference.scores(
        batch.query,
        _maybe_sparse(batch.table, sparse),
        positive,
        negative,
        similarity=batch.similarity,
        options=reference.Options(batch.scale, batch.weights, batch.phase_scale),
        mutation=Mutation(batch.mutation, batch.threshold, batch.thresholds),
        seed=batch.seed,
        row_offset=batch.row_offset,
    )
    return scored, poison


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _canonical(
    query: Tensor,
    table: Tensor,
    scale: Tensor | None,
    weights: Tensor | None,
    positive: Tensor,
    negative: Tensor,
    seed: Tensor,
    row_offset: int,
    mutation: Mutation,
    similarity: str,
    phase_scale: float,
) -> Batch:
    """Contiguous but for the table; floats in the sums' dtype, ids int64, negative (G, K)."""
    dtype = reference.accumulation_dtype(table.dtype)

    def real(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).contiguous()

    negative = negative[None] if negative.ndim == 1 else negative
    return Batch(
        query=real(query),
        table=table,
        scale=None if scale is None else real(scale),
        weights=None if weights is None else real(weights),
        positive=positive.to(torch.int64).contiguous(),
        negative=negative.to(torch.int64).contiguous(),
        seed=seed,
        thresholds=mutation.thresholds,
        row_offset=row_offset,
        mutation=mutation.kind,
        threshold=mutation.threshold,
        similarity=similarity,
        phase_scale=phase_scale,
    )


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(validate.MAX_SEED - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.detach().reshape(())
    return torch.full((), seed, dtype=torch.int64, device=device)


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=like.dtype).reshape(())
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _reference_coefficient(name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """The value, checked; on a GPU, where a check would synchronise, NaN if it is out of range."""
    if not isinstance(value, Tensor):
        return value
    value = _scalar(value, like)
    if value.device.type == "cpu":
        checked: Tensor = ops.OPS.checked_coefficient(value, name)
        return checked
    return torch.where((value >= 0) & value.isfinite(), value, float("nan"))


def _reference_ids(
    positive: Tensor, negative: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids safe to index with; on a GPU, where a check would synchronise, a (B,) NaN factor too."""
    rows = table.shape[0]
    if table.device.type == "cpu":
        positive = ops.OPS.checked_ids(positive, rows, 0, "positive")
        return positive, ops.OPS.checked_ids(negative, rows, -1, "negative"), None
    bad_pos = (positive < 0) | (positive >= rows)
    bad_neg = (negative < -1) | (negative >= rows)
    batch = positive.shape[0]
    bad = bad_pos | bad_neg.any(dim=1).repeat_interleave(batch // max(negative.shape[0], 1), dim=0)
    poison = torch.where(bad, float("nan"), 1.0)
    return positive.masked_fill(bad_pos, 0), negative.masked_fill(bad_neg, 0), poison


class _Sparse(torch.autograd.Function):
    """Identity whose gradient becomes sparse: the rows that are not zero."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        touched = (grad != 0).any(dim=1).nonzero()[:, 0]
        return torch.sparse_coo_tensor(
            touched[None], grad[touched], grad.shape, is_coalesced=True, check_invariants=False
        )


def _maybe_sparse(table: Tensor, sparse: bool) -> Tensor:
    if not sparse:
        return table
    out: Tensor = _Sparse.apply(table)
    return out
