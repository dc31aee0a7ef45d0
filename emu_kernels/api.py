"""The public functions: each checks its arguments, makes one request of them and dispatches it.

What they compute is specified by :mod:`emu_kernels.reference`; which masks they draw, by
:mod:`emu_kernels.mask`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

from torch import Tensor

from emu_kernels import backends, prepare, reference, validate
from emu_kernels.mutation import MutationRate, NoMutation

__all__ = [
    "EmuScores",
    "emu_mutate",
    "emu_scores",
    "fused_emu_loss",
    "fused_softmax_loss",
    "uls_cross_entropy",
]

P = ParamSpec("P")
R = TypeVar("R")


def _renamed(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function take its keyword ``new`` by the name ``old`` too, with a warning."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> R:
            if old in keywords:
                if new in keywords:
                    raise TypeError(f"{new}: got it by its former name, {old}, too")
                warnings.warn(
                    f"{old}: this argument is now named {new}", DeprecationWarning, stacklevel=2
                )
                keywords[new] = keywords.pop(old)
            return function(*args, **keywords)

        return call

    return decorate


class EmuScores(NamedTuple):
    """What :func:`emu_scores` returns."""

    positive: Tensor
    """(B,) score of each row's positive."""
    negative: Tensor
    """(B, K) scores of the negatives without mutation; −inf at padding."""
    mutated: Tensor
    """(B, K) scores of the mutated negatives; −inf at padding. With
    :class:`emu_kernels.Expected`, means over all masks; without mutation, ``negative`` itself."""
    cumulant: Tensor
    """(B, K) with ``Expected``, log E e^ŝ over all masks, to second order; −inf at padding.
    Otherwise ``mutated`` itself, so that a logsumexp over ``cumulant`` is right in both cases."""


def fused_emu_loss(
    query: Tensor,  # (B, D)
    table: Tensor,  # (N, D)
    positive: Tensor,  # (B,)
    negative: Tensor,  # (G, K) or (K,)
    *,
    similarity: str = "dot",
    mutation_rate: MutationRate,
    beta: float | Tensor,
    alpha: float | Tensor,
    scale: Tensor | None = None,  # (B, D), or (B, D/2)
    similarity_weights: Tensor | None = None,
    phase_scale: float = 1.0,
    sample_weight: Tensor | None = None,  # (B,)
    log_q: Tensor | None = None,  # (N,)
    mask_unit: str = "component",
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    reduction: str = "mean",
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""EMU loss L_emu + α · L_van of sampled negatives (Takamoto et al., arXiv 2504.03327).

    Each negative z⁻_k is mutated toward the positive z⁺ by a random mask λ_k, whose components are
    1 with probability ``mutation_rate``: ẑ_k = λ_k ⊙ z⁺ + (1 − λ_k) ⊙ z⁻_k. With
    ŝ_k = φ(query, ẑ_k), s⁺ = φ(query, z⁺), s⁻_k = φ(query, z⁻_k), for each row::

        L_emu = (1/K) · [(l̂ − s⁺) + β Σ_k (l̂ − ŝ_k)]     l̂ = logsumexp(s⁺, ŝ_1..ŝ_K)
        L_van = l − s⁺                                     l = logsumexp(s⁺, s⁻_1..s⁻_K)

    Nothing of size B·K·D is allocated. Gradients flow into ``query``, ``table`` (into the positive
    also through every mutated component), ``scale`` and ``similarity_weights``; they can be
    differentiated again on ``reference`` only.

    Numbers may be Python's or NumPy's.

    Args:
        query: (B, D) fp32, bf16, fp16 or fp64: all of the model's score except the entity being
            corrupted. Converted to fp32 unless it is fp64, also under autocast.
        table: (N, D) the entity embeddings, fp32, bf16, fp16 or (with an fp64 query) fp64; rows may
            be strided. Never cast as a whole.
        positive: (B,) integer row ids in [0, N).
        negative: (G, K) integer row ids in [0, N), or −1 for padding, which is ignored (K above is
            then the row's number of real negatives; a row without any has loss 0). G divides B:
            each block of B/G rows shares one set of negatives. So G = B is a set for each row,
            G = 1 (or shape (K,)) one set for the batch.
        similarity: φ(q, c) of query and candidate, with a (``scale``), w (``similarity_weights``)
            and κ (``phase_scale``):

            - "dot": Σ_j q_j c_j (DistMult, ComplEx)
            - "l1": −Σ_j |q_j − a_j c_j| (TransE, PairRE)
            - "l2": −‖q − a ⊙ c‖₂
            - "rotate": −Σ_j |q_j − c_j| of complex numbers, stored as re‖im (RotatE)
            - "hake": −w_0 Σ_j |sin((q_j − c_j) κ/2)| of the phases − w_1 ‖q − a ⊙ c‖₂ of the
              moduli, stored as phase‖modulus (HAKE)
            - "protate": −w_0 Σ_j |sin((q_j − c_j) κ/2)| of phases (pRotatE)

            The subgradient of a distance of 0 is 0.
        mutation_rate: in [0, 1], rounded to a multiple of 1/256
            (:func:`emu_kernels.mask.effective_rate`). A tensor holds one rate, (), one for each
            component, (D,), or one for each pair, (D/2,), and gets no gradient. An
            :class:`emu_kernels.Expected` takes the expectation over all masks, and draws none; a
            :class:`emu_kernels.Mixup` mixes positive and negative instead.
        beta: the label β ≥ 0 of a mutated negative under unbounded label smoothing; a number, or a
            one-element tensor (for schedules), which gets no gradient.
        alpha: the weight α ≥ 0 of the vanilla term; a number or a tensor, like ``beta``.
        scale: a, (B, D) for "l1" and "l2", (B, D/2) for "hake"; None means ones.
        similarity_weights: w, (2,) for "hake", (1,) for "protate"; None means ones.
        phase_scale: κ, for "hake" and "protate": turns the phases' embeddings into radians (π/r if
            they are in ±r).
        sample_weight: (B,) weight of each row's loss, not differentiated.
        log_q: (N,) of any floating dtype: for each row of ``table`` the logarithm of its (expected)
            share of the drawn candidates, for the logQ correction of sampled softmax (Bengio and
            Senécal, 2008; Yi et al., 2019). Every score s above is replaced by s − log q; a mutated
            negative has its negative's log q, and in closed form means and cumulants are both
            corrected. So both terms are (smoothed) cross-entropies of corrected logits. A constant
            in log q cancels. Not differentiated; copied at the call, so that it may be changed
            before the backward pass. A row with a candidate whose log q is not finite has loss NaN.
            None: no correction, at no cost.
        mask_unit: "component", or "pair": components j and D/2 + j, the parts of a complex number
            in "rotate" (and in ComplEx's "dot"), are mutated together.
        seed: of the masks: an int in [0, 2^63), a one-element int64 tensor on the table's device,
            or None to draw from torch's default generator of that device. Under torch.compile a
            tensor or None never causes a recompilation; ints cause one, at the second value.
        row_offset: global index of row 0, so that sharding a batch changes no mask. Reading it from
            an integer tensor () waits for the tensor's device.
        reduction: "mean" (divides by the sum of ``sample_weight``; 0 for an empty batch), "sum" or
            "none".
        sparse_grad: give ``table`` a sparse (COO) gradient of its touched rows, each once and in
            ascending order, with no N·D buffer. Eager only.
        backend: a name of :data:`emu_kernels.backends.NAMES`, or None for the fastest
            (:func:`emu_kernels.backends.default_backend`).

    Returns:
        The loss: a scalar, or (B,) for reduction "none"; fp32, or fp64 for fp64 inputs. NaN where
        an embedding or a score is not finite.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit.
        IndexError: an id out of range.
        RuntimeError: the backend cannot run here.
        NotImplementedError: forward-mode differentiation, which only ``reference`` has.
    """
    request = prepare.loss(
        prepare.scores(
            query,
            table,
            positive,
            negative,
            similarity=similarity,
            mutation=mutation_rate,
            mask_unit=mask_unit,
            scale=scale,
            similarity_weights=similarity_weights,
            phase_scale=phase_scale,
            seed=seed,
            row_offset=row_offset,
            sparse_grad=sparse_grad,
        ),
        beta=beta,
        alpha=alpha,
        sample_weight=sample_weight,
        reduction=reduction,
        log_q=log_q,
    )
    return backends.resolve(backend, table.device).loss(request).loss


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
    log_q: Tensor | None = None,  # (N,)
    reduction: str = "mean",
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Sampled-softmax cross-entropy: L_van of :func:`fused_emu_loss` alone, by the same kernels.

    Arguments, result and errors are those of :func:`fused_emu_loss`, without the mutation.
    """
    request = prepare.loss(
        prepare.scores(
            query,
            table,
            positive,
            negative,
            similarity=similarity,
            mutation=NoMutation(),
            scale=scale,
            similarity_weights=similarity_weights,
            phase_scale=phase_scale,
            sparse_grad=sparse_grad,
        ),
        beta=0.0,
        alpha=1.0,
        sample_weight=sample_weight,
        reduction=reduction,
        log_q=log_q,
    )
    return backends.resolve(backend, table.device).loss(request).loss


@_renamed("mutation", "mutation_rate")
def emu_scores(
    query: Tensor,  # (B, D)
    table: Tensor,  # (N, D)
    positive: Tensor,  # (B,)
    negative: Tensor,  # (G, K) or (K,)
    *,
    similarity: str = "dot",
    mutation_rate: MutationRate | None,
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
        mutation_rate: as in :func:`fused_emu_loss`; or None, to mutate nothing: ``mutated`` and
            ``cumulant`` are then ``negative`` itself, at no cost. Its former name, ``mutation``,
            is deprecated.
        margin: γ, added to every score.

    There is no ``log_q``: subtract ``log_q[positive]`` and ``log_q[negative]`` from the scores.

    The other arguments and the errors are those of :func:`fused_emu_loss`.

    Returns:
        EmuScores: positive (B,), negative (B, K), mutated (B, K), cumulant (B, K), fp32 (fp64 for
        fp64 inputs). A padding id has score −inf and no gradient.
    """
    request = prepare.scores(
        query,
        table,
        positive,
        negative,
        similarity=similarity,
        mutation=NoMutation() if mutation_rate is None else mutation_rate,
        mask_unit=mask_unit,
        scale=scale,
        similarity_weights=similarity_weights,
        phase_scale=phase_scale,
        seed=seed,
        row_offset=row_offset,
        sparse_grad=sparse_grad,
    )
    margin = validate.finite("margin", margin)
    scored = backends.resolve(backend, table.device).scores(request)
    positive_score, negative_score, mutated_score, cumulant = (
        score + margin if margin else score for score in scored
    )
    mutated_score = mutated_score if request.mutated else negative_score
    return EmuScores(
        positive=positive_score,
        negative=negative_score,
        mutated=mutated_score,
        cumulant=cumulant if request.moments else mutated_score,
    )


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
    """The mutated negatives ẑ = λ ⊙ z⁺ + (1 − λ) ⊙ z⁻ themselves, for black-box scorers.

    The masks are those of :func:`fused_emu_loss` for the same seed; they are never stored.

    Args:
        positive: (B, D) embeddings, fp32, bf16, fp16 or fp64.
        negative: (B, K, D) embeddings of the same dtype.
        mutation_rate, mask_unit, seed, row_offset, backend: as in :func:`fused_emu_loss`.

    Returns:
        (B, K, D) in the inputs' dtype, differentiable in both inputs any number of times.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as :func:`fused_emu_loss`.
    """
    prepare.alone_after_fork()
    validate.embeddings(positive, negative)
    rows, dim = positive.shape
    draws = prepare.draws(
        mutation_rate,
        mask_unit,
        seed=seed,
        row_offset=row_offset,
        rows=rows,
        dim=dim,
        device=positive.device,
    )
    if draws.mutation.draw != "mask":
        given = type(mutation_rate).__name__
        raise TypeError(f"mutation_rate: expected a rate or a tensor of rates, got {given}")
    return backends.resolve(backend, positive.device).mutate(positive, negative, draws)


def uls_cross_entropy(
    positive_score: Tensor,  # (B,)
    negative_score: Tensor,  # (B, K)
    *,
    beta: float | Tensor,
    cumulant: Tensor | None = None,  # (B, K)
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy under unbounded label smoothing: L_emu of given scores (arXiv 2504.03327).

    The positive has label 1, each negative the label β, not normalized to sum to one::

        L = (1/K) · [(l̂ − s⁺) + β Σ_k (l̂ − ŝ_k)]     l̂ = logsumexp(s⁺, ŝ_1..ŝ_K)

    Args:
        positive_score: (B,) s⁺, any floating dtype; computed in fp32 (fp64 for fp64). For a logQ
            correction subtract log q from this, ``negative_score`` and ``cumulant``, as
            :func:`fused_emu_loss` does.
        negative_score: (B, K) ŝ; −inf marks padding, which is ignored.
        beta: ≥ 0, a number or a one-element tensor.
        cumulant: (B, K) to take l̂ over instead of ŝ, which then holds means: the fields
            ``cumulant`` and ``mutated`` of :class:`EmuScores`.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss: a scalar, or (B,) for "none".

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    prepare.alone_after_fork()
    validate.scores(positive_score, negative_score, cumulant)
    dtype = prepare.accumulation_dtype(positive_score.dtype)
    positive_score, negative_score = positive_score.to(dtype), negative_score.to(dtype)
    beta = prepare.usable_coefficient("beta", beta, positive_score)
    validate.one_of("reduction", reduction, validate.REDUCTIONS)
    cumulant = None if cumulant is None else cumulant.to(dtype)
    rows = reference.uls_rows(positive_score, negative_score, beta, cumulant)
    return reference.reduce(rows, None, reduction)
