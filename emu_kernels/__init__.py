"""Fused kernels for hard-negative training of knowledge-graph embeddings: EMU and its ULS loss."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from emu_kernels._version import __version__
from emu_kernels.api import (
    EmuScores,
    emu_mutate,
    emu_scores,
    fused_emu_loss,
    fused_softmax_loss,
    uls_cross_entropy,
)
from emu_kernels.module import EMULoss
from emu_kernels.mutation import Expected, Mixup, MutationRate
from emu_kernels.one_vs_all import one_vs_all_loss
from emu_kernels.optim import RowwiseAdagrad, backward_and_step
from emu_kernels.relational import RelationalGraph, relational_spmm

if TYPE_CHECKING:
    from emu_kernels.trainer.predict import Predictor

__all__ = [
    "EMULoss",
    "EmuScores",
    "Expected",
    "Mixup",
    "MutationRate",
    "RelationalGraph",
    "RowwiseAdagrad",
    "__version__",
    "backward_and_step",
    "emu_mutate",
    "emu_scores",
    "fused_emu_loss",
    "fused_softmax_loss",
    "load",
    "one_vs_all_loss",
    "relational_spmm",
    "uls_cross_entropy",
]


def load(run: str | os.PathLike[str], device: str = "cpu") -> Predictor:
    """Load the best model of an ``emu-train`` run folder, to predict with.

    Needs the trainer's packages: ``pip install 'emu-kernels[trainer]'``.

    Raises:
        ModuleNotFoundError: those packages are not installed.
        emu_kernels.trainer.errors.RunError: the folder holds no run that can be read.
    """
    from emu_kernels.trainer.predict import Predictor

    return Predictor(run, device)
