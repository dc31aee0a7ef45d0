"""PyKEEN's sLCWA training loop with EMU's loss."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pykeen.training import SLCWATrainingLoop, training_loop_resolver
from pykeen.triples.instances import SLCWABatch
from torch import Tensor

from emu_kernels import Expected, backends, validate

from .loss import checked_model, emu_loss
from .mapping import map_model

logger = logging.getLogger(__name__)


class EMUTrainingLoop(SLCWATrainingLoop):
    """PyKEEN's sLCWA training loop with EMU's loss instead of the model's own.

    Everything else is PyKEEN's: negative samplers and filters, optimizers, schedulers, early
    stopping, checkpoints, trackers, callbacks. Of the model's ``loss`` only the reduction is used.
    Masks are drawn from torch's default generator, whose state PyKEEN's checkpoints include.

    Args:
        mutation_rate, beta, alpha, backend: as in :func:`emu_kernels.fused_emu_loss`. The first
            three may be reassigned between epochs, by a callback for instance.
        keywords: those of ``SLCWATrainingLoop``.

    Raises:
        TypeError: a model without entity representations to mutate, or an
            :class:`emu_kernels.Expected` with a model that the kernels cannot score.
        ValueError: an invalid rate, coefficient or backend.
    """

    def __init__(
        self,
        *,
        mutation_rate: float | Tensor | Expected,
        beta: float | Tensor,
        alpha: float | Tensor,
        backend: str | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(**keywords)
        mapping, why = map_model(checked_model(self.model))
        if not isinstance(mutation_rate, (Tensor, Expected)):
            validate.rate("mutation_rate", mutation_rate)
        validate.coefficient("beta", beta)
        validate.coefficient("alpha", alpha)
        if isinstance(mutation_rate, Expected) and mapping is None:
            raise TypeError(
                f"mutation_rate: {type(self.model).__name__} cannot train in closed form "
                f"(Expected): {why}"
            )
        if backend is not None:
            validate.one_of("backend", backend, backends.NAMES)
        self.mutation_rate = mutation_rate
        self.beta = beta
        self.alpha = alpha
        self.backend = backend
        if mapping is None:
            logger.warning(
                "%s trains with EMU by PyKEEN's own interaction, which takes more time and memory "
                "than the fused kernels: %s.",
                type(self.model).__name__,
                why,
            )

    def _process_batch(
        self,
        batch: SLCWABatch,
        start: int,
        stop: int,
        label_smoothing: float = 0.0,
        slice_size: int | None = None,
    ) -> Tensor:
        if slice_size is not None:
            raise AttributeError("Slicing is not possible for sLCWA training loops.")
        if label_smoothing:
            raise ValueError(
                f"label_smoothing: expected 0, got {label_smoothing}: beta is EMU's label smoothing"
            )
        masks = batch.get("masks")
        loss = emu_loss(
            self.model,
            batch["positives"][start:stop],
            batch["negatives"][start:stop],
            None if masks is None else masks[start:stop],
            mutation_rate=self.mutation_rate,
            beta=self.beta,
            alpha=self.alpha,
            weights=_weights(batch, start, stop),
            mode=self.mode,
            reduction=self.loss.reduction,
            backend=self.backend,
        )
        return loss + self.model.collect_regularization_term()


def _weights(batch: SLCWABatch, start: int, stop: int) -> Tensor | None:
    """(B,) weights of the positives, which their negatives must share: EMU weights whole rows."""
    positive, negative = batch.get("pos_weights"), batch.get("neg_weights")
    if positive is None:
        return None
    positive = positive[start:stop].reshape(stop - start)
    if negative is not None:
        negative = negative[start:stop].reshape(stop - start, -1)
        if not torch.equal(negative, positive[:, None].expand_as(negative)):
            raise ValueError(
                "loss_weighter: expected a weight for each positive that its negatives share (as "
                "RelationLossWeighter gives); EMU cannot weight single negatives"
            )
    return positive


training_loop_resolver.register(EMUTrainingLoop, raise_on_conflict=False)
