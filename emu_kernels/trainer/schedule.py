"""Learning rates over the steps of a run, and a change of optimizer on the way.

Everything is a function of the settings and the step, so a resumed run goes on exactly. Nothing
depends on the number of steps, which --resume may change: what a schedule derives from it is stored
when the run is made. A new schedule is an entry of :data:`SCHEDULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from emu_kernels.optim import RowwiseAdagrad

from .settings import Choice

if TYPE_CHECKING:
    from .config import Config


@dataclass(frozen=True)
class Schedule(Choice):
    """An entry of :data:`SCHEDULES`.

    Attributes:
        factor: maps the share of decay_steps that is past to a factor of the learning rate.
    """

    factor: Callable[[float], float]


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule("the same rate throughout", (), lambda past: 1.0),
    "step": Schedule(
        "a tenth of it after every so many steps", ("decay_steps",), lambda past: 0.1 ** int(past)
    ),
    "cosine": Schedule(
        "down to 0 along half a cosine",
        ("decay_steps",),
        lambda past: (1 + math.cos(math.pi * min(past, 1.0))) / 2,
    ),
}


def has_switched(config: Config, step: int) -> bool:
    """Whether training step `step`, counted from 0, uses the second optimizer."""
    return config.switch_at is not None and step >= config.switch_at


def learning_rate(config: Config, step: int) -> float:
    """The rate of training step `step`, counted from 0.

    The warm-up and the schedule count from the first step of the run. After the change of optimizer
    they apply to a tenth of the rate.
    """
    base = config.lr / 10 if has_switched(config, step) else config.lr
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    past = step / config.decay_steps if config.decay_steps else 0.0
    return base * warm * SCHEDULES[config.schedule].factor(past)


def new_optimizer(config: Config, model: nn.Module, step: int) -> torch.optim.Optimizer:
    """A new optimizer for training step `step`, without state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name = str(config.switch_to if has_switched(config, step) else config.optimizer)
    lr = learning_rate(config, step)
    if name == "RowwiseAdagrad":
        return RowwiseAdagrad(trained, lr)
    # On a CPU the fused step is one pass over parameter, gradient and state, not several.
    fused = True if torch.device(config.device).type == "cpu" else None
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(trained, lr=lr, fused=fused)
    return optimizer
