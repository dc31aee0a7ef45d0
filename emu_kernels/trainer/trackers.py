"""Experiment trackers: where a run's metrics are logged besides its folder.

A tracker is an entry of :data:`TRACKERS`: a context that yields a function to log metrics. It may
fail: a run does not depend on it.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import ConfigError, RunError
from .settings import Choice
from .terminal import quoted

Line = dict[str, Any]
"""A line of metrics.jsonl."""
Log = Callable[[Line], None]


@dataclass(frozen=True)
class Tracker(Choice):
    """An entry of :data:`TRACKERS`.

    Attributes:
        package: the package to import, which the extra of the same name installs; "" for none.
        open: makes the context from the run folder, the settings, and the lines logged so far.
    """

    package: str
    open: Callable[[Path, dict[str, Any], Sequence[Line]], AbstractContextManager[Log]]

    def check(self) -> None:
        """Raises: ConfigError: the package is not installed."""
        if self.package and find_spec(self.package) is None:
            raise ConfigError(
                f"tracker: {self.package} is not installed: "
                f"pip install 'emu-kernels[{self.package}]'"
            )


@contextmanager
def opened(
    name: str, folder: Path, config: dict[str, Any], logged: Sequence[Line]
) -> Iterator[Log]:
    """The tracker of a run. If it fails later on, this is said once, and the run goes on without.

    Raises:
        RunError: it cannot be opened.
    """
    stack = ExitStack()
    try:
        log = stack.enter_context(TRACKERS[name].open(folder, config, logged))
    except Exception as error:
        raise RunError(
            f"{_failure(name, error)}; mend it and go on with: emu-train --resume "
            f"{quoted(folder)}, or without it: --tracker none"
        ) from error
    failed = False

    def log_or_say(line: Line) -> None:
        nonlocal failed
        if not failed:
            try:
                log(line)
            except Exception as error:
                failed = True
                _warn(f"{_failure(name, error)}; it gets no metrics from step {line['step']} on")

    try:
        yield log_or_say
    finally:
        try:
            stack.__exit__(*sys.exc_info())
        except Exception as error:
            _warn(f"{_failure(name, error)}, when it was closed")


def _warn(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _failure(name: str, error: Exception) -> str:
    return f"tracker: {name} failed: {' '.join(str(error).split()) or type(error).__name__}"


@contextmanager
def _none(folder: Path, config: dict[str, Any], logged: Sequence[Line]) -> Iterator[Log]:
    yield lambda line: None


@contextmanager
def _tensorboard(folder: Path, config: dict[str, Any], logged: Sequence[Line]) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    # All lines anew, as a resumed run may have lost some, and its tracker others.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=0)
    writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", 0)

    def log(line: Line) -> None:
        for name, value in _numbers(line).items():
            writer.add_scalar(name, value, line["step"])

    try:
        for line in logged:
            log(line)
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path, config: dict[str, Any], logged: Sequence[Line]) -> Iterator[Log]:
    import wandb

    id_file = folder / "wandb-id"  # so that a resumed run continues the same W&B run
    identity = id_file.read_text() if id_file.exists() else ""
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", "emu-kernels"),
        name=os.environ.get("WANDB_NAME", folder.resolve().name),
        id=identity or os.environ.get("WANDB_RUN_ID", secrets.token_hex(8)),
        resume="allow",
        dir=os.environ.get("WANDB_DIR", folder),
        config=config,
    ) as run:
        run.define_metric("*", step_metric="step")  # as a resumed run logs some steps again

        def log(line: Line) -> None:
            run.log(_numbers(line) | {"step": line["step"]})

        if not identity:
            id_file.write_text(run.id)
            for line in logged:
                log(line)
        yield log


TRACKERS = {
    "none": Tracker("nowhere", (), "", _none),
    "tensorboard": Tracker("files in the run folder", (), "tensorboard", _tensorboard),
    "wandb": Tracker("Weights & Biases, set up by its own variables", (), "wandb", _wandb),
}


def _numbers(line: Line) -> dict[str, float]:
    """The measured values, by names such as "valid/mrr"."""
    split = line.get("split", "train")
    return {f"{split}/{k}": v for k, v in line.items() if k not in ("step", "split", "of_step")}
