"""Fused kernels for hard-negative training of knowledge-graph embeddings: EMU and its ULS loss."""

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
from emu_kernels.mutation import Expected, Mixup
from emu_kernels.one_vs_all import one_vs_all_loss

__all__ = [
    "EMULoss",
    "EmuScores",
    "Expected",
    "Mixup",
    "__version__",
    "emu_mutate",
    "emu_scores",
    "fused_emu_loss",
    "fused_softmax_loss",
    "one_vs_all_loss",
    "uls_cross_entropy",
]
