"""What several of the trainer's tests use."""

from __future__ import annotations

from emu_kernels.trainer import cli
from emu_kernels.trainer.models import Model, Scorer

QUICK = """
    --dim=8 --batch-size=64 --negatives=8 --steps=40 --eval-every=20 --log-every=10
""".split()  # noqa: SIM905


def train(*arguments: object) -> int:
    """The exit status of ``emu-train``."""
    return cli.main([str(argument) for argument in arguments])


def embeddings(scorer: Scorer) -> Model:
    """A model with embeddings, as one."""
    assert isinstance(scorer, Model)
    return scorer
