"""What several of the trainer's tests use."""

from __future__ import annotations

from emu_kernels.trainer.models import Model, Scorer


def embeddings(scorer: Scorer) -> Model:
    """A model with embeddings, as one."""
    assert isinstance(scorer, Model)
    return scorer
