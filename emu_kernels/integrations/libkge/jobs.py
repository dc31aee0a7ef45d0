"""LibKGE's training jobs with EMU's loss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kge import Config, Dataset
from kge.job import Job, TrainingJob1vsAll, TrainingJobNegativeSampling
from kge.model import KgeModel
from kge.util.sampler import BatchNegativeSample, NaiveSharedNegativeSample
from torch import Tensor

from emu_kernels import EMULoss, Expected, backends, one_vs_all_loss, validate
from emu_kernels.mutation import MASK_UNITS, mask_unit
from emu_kernels.similarity import SIMILARITIES
from emu_kernels.validate import MAX_SEED

from .scorers import O, P, S, embedder_of, map_model, plain_table, query_of

SLOTS = (S, O)
"""The slots whose entities are predicted."""


class TrainingJobEMU(TrainingJobNegativeSampling):
    """LibKGE's negative sampling with EMU's loss instead of ``train.loss``.

    Everything else is LibKGE's: samplers, embedders, penalties, subbatches, checkpoints,
    validation, search. A batch's loss is the mean over its triples of
    :func:`emu_kernels.fused_emu_loss` for the subject plus that for the object. The attribute
    ``emu_loss`` holds the rate and the coefficients, which hooks may reassign.

    Args:
        config, dataset, parent_job, model, forward_only: as in LibKGE, which makes the job.

    Raises:
        ValueError: an option that does not fit, a model that the kernels cannot score, or negatives
            for relations.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        parent_job: Job | None = None,
        model: KgeModel | None = None,
        forward_only: bool = False,
    ) -> None:
        super().__init__(config, dataset, parent_job, model=model, forward_only=forward_only)
        self.type_str = "emu"
        _check_loss(config)
        if self._sampler.num_samples[P] > 0:
            raise ValueError(
                "negative_sampling.num_samples.p: EMU mutates entities, and has no loss for "
                f"replaced relations; expected 0, got {int(self._sampler.num_samples[P])}"
            )
        self._mapping = map_model(self.model)
        expected = config.get("emu.expected")
        unit = config.check("emu.mask_unit", ["auto", *MASK_UNITS])
        if unit == "auto":
            unit = mask_unit(pairs=expected and SIMILARITIES[self._mapping.similarity].coupled)
        rate = validate.rate("emu.mutation_rate", config.get("emu.mutation_rate"))
        self.emu_loss = EMULoss(
            mutation_rate=Expected(rate) if expected else rate,
            beta=validate.coefficient("emu.beta", config.get("emu.beta")),
            alpha=validate.coefficient("emu.alpha", config.get("emu.alpha")),
            similarity=self._mapping.similarity,
            mask_unit=unit,
            reduction="sum",
            backend=_backend(config, "emu"),
        )
        _created(self, TrainingJobEMU)

    def _prepare_batch(self, batch_index: int, batch: dict[str, Any], result: Any) -> None:
        super()._prepare_batch(batch_index, batch, result)
        # One seed for the whole batch, so that its masks do not depend on the subbatches.
        batch["seeds"] = torch.randint(MAX_SEED - 1, (3,), device=batch["triples"].device)

    def _process_subbatch(
        self, batch_index: int, batch: dict[str, Any], subbatch_slice: slice, result: Any
    ) -> None:
        triples = batch["triples"][subbatch_slice]
        for slot in SLOTS:
            if self._sampler.num_samples[slot] <= 0:
                continue
            with _timed(result, "prepare_time"):
                negative = _samples(batch["negative_samples"][slot], subbatch_slice)
            with _timed(result, "forward_time"):
                loss = self._slot_loss(
                    triples, slot, negative, batch["seeds"][slot], subbatch_slice.start
                )
                loss = loss / result.size
                result.avg_loss += loss.item()
            with _timed(result, "backward_time"):
                if not self.is_forward_only:
                    loss.backward()

    def _slot_loss(
        self,
        triples: Tensor,  # (B, 3)
        slot: int,
        negative: Tensor,  # (B, K) or (K,)
        seed: Tensor,
        row_offset: int,
    ) -> Tensor:
        """The sum of the rows' losses for the entity in ``slot``."""
        query, side = query_of(self.model, self._mapping, triples, slot)
        embedder = embedder_of(self.model, slot)
        positive = triples[:, slot]
        table = plain_table(embedder)
        sparse = table is not None and embedder.sparse
        if table is None or (sparse and self._mapping.halved):
            # Embeddings are computed, or are a half of the table, which has no sparse gradient.
            ids, place = torch.cat((positive, negative.flatten())).unique(return_inverse=True)
            table, sparse = embedder.embed(ids), False
            positive = place[: len(positive)]
            negative = place[len(positive) :].view(negative.shape)
        self.emu_loss.sparse_grad = sparse
        return self.emu_loss(
            query,
            self._mapping.candidates(table, side),
            positive,
            negative,
            seed=seed,
            row_offset=row_offset,
        )


class TrainingJobEMU1vsAll(TrainingJob1vsAll):
    """LibKGE's 1vsAll with EMU's loss in closed form, or the softmax, over all entities.

    A batch's loss is the mean over its triples of :func:`emu_kernels.one_vs_all_loss` for the
    object plus that for the subject.

    Args:
        config, dataset, parent_job, model, forward_only: as in LibKGE, which makes the job.

    Raises:
        ValueError: an option that does not fit, or a model that the kernels cannot score.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        parent_job: Job | None = None,
        model: KgeModel | None = None,
        forward_only: bool = False,
    ) -> None:
        super().__init__(config, dataset, parent_job, model=model, forward_only=forward_only)
        self.type_str = "emu_1vsAll"
        _check_loss(config)
        self._mapping = map_model(self.model)
        rate = validate.rate("emu_1vsAll.mutation_rate", config.get("emu_1vsAll.mutation_rate"))
        self.mutation_rate = None if config.get("emu_1vsAll.softmax") else Expected(rate)
        self.beta = validate.coefficient("emu_1vsAll.beta", config.get("emu_1vsAll.beta"))
        self.alpha = validate.coefficient("emu_1vsAll.alpha", config.get("emu_1vsAll.alpha"))
        self.backend = _backend(config, "emu_1vsAll")
        _created(self, TrainingJobEMU1vsAll)

    def _process_subbatch(
        self, batch_index: int, batch: dict[str, Any], subbatch_slice: slice, result: Any
    ) -> None:
        with _timed(result, "prepare_time"):
            triples = batch["triples"][subbatch_slice].to(self.device)
        for slot in SLOTS:
            with _timed(result, "forward_time"):
                loss = self._slot_loss(triples, slot) / result.size
                result.avg_loss += loss.item()
            with _timed(result, "backward_time"):
                if not self.is_forward_only:
                    loss.backward()

    def _slot_loss(self, triples: Tensor, slot: int) -> Tensor:
        """The sum of the rows' losses for the entity in ``slot``."""
        query, side = query_of(self.model, self._mapping, triples, slot)
        embedder = embedder_of(self.model, slot)
        table = plain_table(embedder)
        if table is None or embedder.sparse:  # then the parameter's gradient has to be sparse
            table = embedder.embed_all()
        return one_vs_all_loss(
            query,
            self._mapping.candidates(table, side),
            triples[:, slot],
            similarity=self._mapping.similarity,
            mutation_rate=self.mutation_rate,
            beta=self.beta,
            alpha=self.alpha,
            mask_unit=mask_unit(pairs=SIMILARITIES[self._mapping.similarity].coupled),
            reduction="sum",
            backend=self.backend,
        )


def _samples(negatives: BatchNegativeSample, rows: slice) -> Tensor:
    """(B, K) ids of the negatives of some rows, or (K,) where all rows of the batch share them."""
    if isinstance(negatives, NaiveSharedNegativeSample):
        return negatives.samples()[0]
    return negatives.samples(rows)


def _check_loss(config: Config) -> None:
    if config.get("train.loss") != "kl":
        raise ValueError(
            f"train.loss: EMU's loss takes its place; expected kl, the default, got "
            f"{config.get('train.loss')}"
        )


def _backend(config: Config, key: str) -> str | None:
    name = config.get(f"{key}.backend")
    if not name:
        return None
    validate.one_of(f"{key}.backend", name, backends.NAMES)
    return str(name)


def _created(job: Job, kind: type[Job]) -> None:
    """Run the hooks, as the constructor of each LibKGE job does last, unless it is a subclass's."""
    if type(job) is kind:
        for hook in Job.job_created_hooks:
            hook(job)


@contextmanager
def _timed(result: Any, name: str) -> Iterator[None]:
    """Add the time to a field of LibKGE's result of a batch."""
    start = time.time()
    yield
    setattr(result, name, getattr(result, name) + time.time() - start)
