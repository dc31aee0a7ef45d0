"""Experiment trackers: where a run's metrics are logged besides its folder.

A tracker is an entry of :data:`TRACKERS`: a context that yields a function to log metrics.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .settings import Choice

Log = Callable[[dict[str, Any]], None]
"""Logs a line of metrics.jsonl."""


@dataclass(frozen=True)
class Tracker(Choice):
    """An entry of :data:`TRACKERS`.

    Attributes:
        package: the package to import, which the extra of the same name installs.
        open: makes the context from the run folder, the settings, and the step that the run
            continues from.
    """

    package: str
    open: Callable[[Path, dict[str, Any], int], AbstractContextManager[Log]]

    def check(self) -> None:
        """Raises: ConfigError: the package is not installed."""
        if find_spec(self.package) is None:
            raise ConfigError(
                f"tracker: {self.package} is not installed: "
                f"pip install 'emu-kernels[{self.package}]'"
            )


@contextmanager
def _tensorboard(folder: Path, config: dict[str, Any], step: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
    writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", step)

    def log(record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"])

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path, config: dict[str, Any], step: int) -> Iterator[Log]:
    import wandb

    id_file = folder / "wandb-id"  # so that a resumed run continues the same W&B run
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    with wandb.init(
        project="emu-kernels",
        name=folder.name,
        id=id_file.read_text(),
        resume="allow",
        dir=folder,
        config=config,
    ) as run:
        run.define_metric("*", step_metric="step")  # as a resumed run logs some steps again
        yield lambda record: run.log(_numbers(record) | {"step": record["step"]})


TRACKERS = {
    "tensorboard": Tracker("files in the run folder", (), "tensorboard", _tensorboard),
    "wandb": Tracker("Weights & Biases, set up by its own variables", (), "wandb", _wandb),
}


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The measured values, by names such as "valid/mrr"."""
    split = record.get("split", "train")
    return {f"{split}/{k}": v for k, v in record.items() if k not in ("step", "split", "of_step")}
