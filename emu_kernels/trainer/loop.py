"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emu_kernels import backends
from emu_kernels.negatives import derive_seed
from emu_kernels.optim import ROW_OPTIMIZERS, backward_and_step

from . import checkpoint
from .batches import Batch
from .breakdown import by_relation
from .config import Config
from .data import Graph
from .errors import ConfigError, RunError, TrainingError
from .evaluation import Evaluator, Metrics, Ranks, Stopped, is_better
from .frequency import SubsamplingWeights
from .initial import set_entities
from .losses import LOSSES, Step
from .models import MODELS, SCORERS, Model, Scorer, is_finite
from .report import plot_metrics
from .run import Metric, RunFolder, new_model, restore_model
from .sampling import CORRUPTIONS, known_answers, new_negatives
from .schedule import has_switched, learning_rate, new_optimizer
from .terminal import quoted
from .trackers import TRACKERS, Log

STEPS_BEFORE_ESTIMATE = 100


class Trainer:
    """One run: a model, its optimizer, and its progress.

    Everything random is a function of (seed, step), so a checkpoint (model, optimizer, step)
    determines the rest of the run.

    Args:
        config: the settings.
        graph: the training, validation and test triples.
        run: where to write; None keeps everything in memory.

    Attributes:
        tracker: also given each line of metrics (:mod:`emu_kernels.trainer.trackers`).
    """

    tracker: Log | None = None
    _stop_event = threading.Event

    def __init__(self, config: Config, graph: Graph, run: RunFolder | None = None) -> None:
        check_graph(config, graph)
        self.config = config
        self.graph = graph
        self.run = run
        self.device = torch.device(config.device)
        self.model: Scorer = self._new_model()
        self._compare = None
        if not isinstance(self.model, Model):
            self._compare = self.model.comparer(config, graph)
        self.optimizer = new_optimizer(config, self.model, 0)
        self.evaluator = self._new_evaluator()

        train = graph.triples["train"].to(self.device)
        self._weights, rows = None, train
        if graph.weights is not None:
            self._weights = graph.weights.to(self.device)
            rows = torch.column_stack([train, torch.arange(len(train), device=self.device)])
        self._batches = CORRUPTIONS[config.corruption].make(config, graph, rows)
        self._negatives = new_negatives(config, graph, train)
        self._known = known_answers(config, graph, train)
        self._subsampling = (
            SubsamplingWeights(train, graph.num_relations) if config.subsampling else None
        )

        self.step = 0  # steps done
        self.seconds = 0.0  # spent on them, without evaluation
        self.best: dict[str, Any] | None = None  # the best validation: step and metrics
        self.waited = 0  # validations since then
        self._validated = 0  # the step of the last one
        self._saved = 0  # the step of the last checkpoint
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._loss_count = 0  # steps since the last log line

    def _new_model(self) -> Scorer:
        config, graph, run = self.config, self.graph, self.run
        model = new_model(config, graph).to(self.device)
        if isinstance(model, Model):
            if config.init_entities is not None and not (run and run.last_file.exists()):
                file, frozen = Path(config.init_entities), config.freeze_entities
                tqdm.write(set_entities(model, graph, file, all_needed=frozen), file=sys.stderr)
            model.entity.requires_grad_(not config.freeze_entities)
        return model

    def _new_evaluator(self) -> Evaluator:
        return Evaluator(self.graph, self.device, self.config, self.config.seed)

    @classmethod
    def resume(cls, config: Config, graph: Graph, run: RunFolder) -> Trainer:
        """Continue from the run's last checkpoint, or from the start if there is none."""
        run.check_mask_contract()
        trainer = cls(config, graph, run)
        if run.last_file.exists():
            trainer._restore()
        run.forget_metrics_after(trainer.step)
        for record in run.read_metrics():
            if record.get("split") == "valid" and record["step"] <= trainer.step:
                trainer._count(record)
        return trainer

    def train(self, until: int | None = None) -> bool:
        """Train until step `until` (default: the config's steps), evaluating and saving on the way.

        Ctrl-C or SIGTERM stops it after the current step and a checkpoint, a second one at once.
        A checkpoint is written before each validation; if the validation is stopped, the resumed
        run does it first. With a patience in the config, training ends early after so many
        validations without a better one.

        Returns:
            Whether it reached `until` or lost patience; False after Ctrl-C.

        Raises:
            TrainingError: the loss is not finite.
            RunError: something could not be written.
        """
        config = self.config
        until = config.steps if until is None else until
        whole = True  # whether the last validation was not stopped
        bar = tqdm(
            total=until * config.batch_size,
            initial=self.step * config.batch_size,
            desc=f"{config.model} {config.loss}",
            unit="triple",
            unit_scale=True,
            disable=None,  # shown on a terminal only
        )
        with stop_signals(self._stop_event()) as stop, bar:
            if self.step and self._due(until) and self._validated < self.step:
                whole = self._validate(math.nan, stop)
            started = time.perf_counter()
            told_at, before = self.step + STEPS_BEFORE_ESTIMATE, self.seconds
            while self.step < until and not (stop.is_set() or self.out_of_patience):
                self._train_step()
                bar.update(config.batch_size)
                if self.step == told_at < until:
                    self._tell_time(self.seconds - before + time.perf_counter() - started, until)
                log = self.step % config.log_every == 0
                evaluate = self._due(until)
                if not (log or evaluate):
                    continue
                loss = self._mean_loss()
                self.seconds += time.perf_counter() - started
                if log:
                    self._log_loss(loss)
                    bar.set_postfix_str(f"step {self.step}, loss {loss:.4f}", refresh=False)
                if evaluate:
                    self.save()
                    whole = self._validate(loss, stop)
                started = time.perf_counter()
            self.seconds += time.perf_counter() - started
        if stop.is_set() and self._saved != self.step:
            self.save()
        if self.out_of_patience and self.step < until:
            tqdm.write(
                f"ended at step {self.step} of {until}: the last {self.waited} validations brought "
                "no better model (--patience)",
                file=sys.stderr,
            )
        return (self.step >= until and whole) or self.out_of_patience

    def _due(self, until: int) -> bool:
        """Whether a validation follows the current step."""
        return self.step % self.config.eval_every == 0 or self.step == until

    @property
    def out_of_patience(self) -> bool:
        """Whether as many validations as the config's patience brought no better model."""
        return self.config.patience is not None and self.waited >= self.config.patience

    def _train_step(self) -> None:
        config, model = self.config, self.model
        if self.step == config.switch_at:
            self.optimizer = new_optimizer(config, model, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        batch = self._batches(self.step)
        negative = self._negatives(self.step, batch)
        weight = self._weight(batch)
        seed = derive_seed(config.seed, "mask", self.step)
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(model, Model):
            loss = self._differentiate(model, batch, negative, weight, seed)
        else:
            assert self._compare is not None
            loss = LOSSES[config.loss](self._compare(batch, negative, weight, seed))
            loss.backward()
        self.optimizer.step()

        self._loss_sum += loss.detach()
        self._loss_count += 1
        self.step += 1

    def _weight(self, batch: Batch) -> Tensor | None:
        """(B,): the triples' own weights, times those of subsampling."""
        own = None if self._weights is None else self._weights[batch.place]
        if self._subsampling is None:
            return own
        weight = self._subsampling(batch)
        return weight if own is None else own * weight

    def _differentiate(
        self, model: Model, batch: Batch, negative: Tensor, weight: Tensor | None, seed: int
    ) -> Tensor:
        """The loss of a model with embeddings, after its backward pass."""
        config, known = self.config, self._known
        # The query's rows are detached, and their (B, D) gradient is added to the table's below:
        # autograd would allocate a second (N, D) buffer for it.
        trained = model.entity.requires_grad
        rows = model.entity.detach()[batch.given].requires_grad_(trained)
        loss = LOSSES[config.loss](
            Step(
                config=config,
                model=model,
                query=model.ask(rows, batch.relation, batch.direction),
                table=model.candidates(),
                positive=batch.positive,
                negative=negative,
                known=None
                if known is None
                else known.lists(batch.given, batch.relation, batch.direction),
                sample_weight=weight,
                seed=seed,
            )
        )
        if trained and not config.regularization and type(self.optimizer) in ROW_OPTIMIZERS:
            backward_and_step(loss, self.optimizer, model.entity, batch.given, rows)
            return loss
        loss.backward()
        if trained:
            assert model.entity.grad is not None
            assert rows.grad is not None
            model.entity.grad.index_add_(0, batch.given, rows.grad)
        if config.regularization:
            for table in (model.entity, model.relation):
                if table.requires_grad:
                    add_l3_gradient(table, config.regularization)
        return loss

    def _mean_loss(self) -> float:
        if not self._loss_count:
            return math.nan
        loss = float(self._loss_sum) / self._loss_count
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} by step {self.step}: try a smaller lr" + self._way_on()
            )
        return loss

    def _way_on(self) -> str:
        if self.run is None:
            return ""
        saved = f"of step {self._saved}" if self._saved else "none, so it starts anew"
        lr = f"{self.config.lr / 2:g}"
        return (
            f": emu-train --resume {quoted(self.run.path)} --lr {lr} (the last checkpoint: {saved})"
        )

    def _tell_time(self, seconds: float, until: int) -> None:
        """Say how long the rest will take, from the time of the steps so far."""
        left = duration(seconds / STEPS_BEFORE_ESTIMATE * (until - self.step))
        tqdm.write(
            f"{STEPS_BEFORE_ESTIMATE} steps took {seconds:.3g} s: about {left} for the other "
            f"{until - self.step:,}, without validation",
            file=sys.stderr,
        )

    def _log_loss(self, loss: float) -> None:
        self._loss_sum.zero_()
        self._loss_count = 0
        epoch = self.step * self.config.batch_size / len(self.graph.triples["train"])
        seconds = round(self.seconds, 3)
        self._log({"step": self.step, "epoch": epoch, "loss": loss, "seconds": seconds})

    def _log(self, record: Metric) -> None:
        if self.run:
            self.run.append_metrics(record)
        if self.tracker:
            self.tracker(record)

    def _validate(self, loss: float, stop: threading.Event) -> bool:
        """Validate, and write what it finds. Returns whether it was not stopped."""
        if len(self.graph.triples["valid"]) == 0:
            return True
        try:
            metrics = self.evaluator.evaluate(self.model, "valid", stop.is_set)
        except Stopped:
            return False
        record = {"step": self.step, "split": "valid", **vars(metrics)}
        is_best = self._count(record)
        if self.run and is_best:  # before the log line, from which a resumed run takes the best
            self.run.save(self.run.best_file, self._model_tensors(), record)
        self._log(record)
        if self.run:
            self._plot()
        marker = " (best)" if is_best else ""
        shown = "" if math.isnan(loss) else f"loss {loss:.4f}, "  # NaN: the run was resumed here
        tqdm.write(
            f"step {self.step}: {shown}validation MRR {metrics.mrr:.4f}{marker}, "
            f"Hits@10 {metrics.hits_at_10:.4f}, {self.seconds:.0f} s",
            file=sys.stderr,
        )
        return True

    def _count(self, record: dict[str, Any]) -> bool:
        """Update the best validation and the patience. Returns whether this one is the best."""
        metric = self.config.metric
        is_best = self.best is None or is_better(metric, record[metric], self.best[metric])
        self.waited = 0 if is_best else self.waited + 1
        self.best = record if is_best else self.best
        self._validated = record["step"]
        return is_best

    def save(self) -> None:
        """Write the last checkpoint, unless the model holds values that are not finite."""
        if self.run is None:
            return
        if not self._is_finite():
            raise TrainingError(
                f"the model's values are not all finite at step {self.step}: try a smaller lr"
                + self._way_on()
            )
        tensors = self._model_tensors()
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        state = {
            "made_by": self._made_by(),
            "step": self.step,
            "seconds": self.seconds,
            "loss_sum": float(self._loss_sum),
            "loss_count": self._loss_count,
        }
        self.run.save(self.run.last_file, tensors, state)
        self._saved = self.step

    def _made_by(self) -> str:
        """What a checkpoint's tensors belong to, which their shapes do not tell."""
        return f"{self.config.model} with {type(self.optimizer).__name__}"

    def _is_finite(self) -> bool:
        return all(map(is_finite, self.model.parameters()))

    def _plot(self) -> None:
        assert self.run is not None
        title = f"{self.config.model}, {self.config.loss}, d = {self.config.dim}"
        plot_metrics(self.run.read_metrics(), title, self.run.plot_file)

    def _restore(self) -> None:
        assert self.run is not None
        file = self.run.last_file
        tensors, state = checkpoint.load(file, mapped=True)
        restore_model(self.model, tensors, file)
        optimizer: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                optimizer.setdefault(int(index), {})[name] = tensor.clone()
        try:
            self.step = self._saved = int(state["step"])
            if self.step > 0 and has_switched(self.config, self.step - 1):
                self.optimizer = new_optimizer(self.config, self.model, self.step - 1)
            if (made_by := state.get("made_by", self._made_by())) != self._made_by():
                raise ValueError(f"expected {self._made_by()}, got {made_by}")
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
            self.seconds = float(state["seconds"])
            self._loss_sum.fill_(state["loss_sum"])
            self._loss_count = int(state["loss_count"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{file} is not a checkpoint of this run: {error!r}") from error

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint, from which the run can go on; 0 without one."""
        return self._saved

    @property
    def best_step(self) -> int:
        """The step of the best validation, or the current one if there was none."""
        return self.best["step"] if self.best else self.step

    def best_model(self) -> Scorer:
        """The model of the best validation, or the current one if no best model was written."""
        if self.run is None or not self.run.best_file.exists():
            return self.model
        return self.run.load_model(self.graph)[0].to(self.device)

    def finish(self) -> Ranks | None:
        """The best model's ranks of the test split, None without one; logs their metrics."""
        if len(self.graph.of_split("test").triples["test"]) == 0:
            return None
        ranks = self.evaluator.split_ranks(self.best_model(), "test")
        record = {"step": self.step, "split": "test", "of_step": self.best_step}
        record |= vars(Metrics.of(ranks))
        if self.run:  # first, so that a run with the record has the file
            self.run.write_relations(
                by_relation(self.graph.of_split("test"), self.evaluator.ranked("test"), ranks)
            )
            if record not in self.run.read_metrics():  # a finished run may be resumed
                self._log(record)
        return ranks

    def whole_model(self) -> Scorer | None:
        """The best model with all its parameters; None except in the first process."""
        return self.best_model()

    def export(self) -> Scorer | None:
        """Write the best model's embeddings, if it has any. Returns :meth:`whole_model`."""
        assert self.run is not None
        model = self.whole_model()
        if isinstance(model, Model):
            self.run.export_embeddings(model, self.graph, tsv=self.config.tsv)
        return model

    def _model_tensors(self) -> dict[str, Tensor]:
        return {f"model.{name}": parameter for name, parameter in self.model.named_parameters()}


def duration(seconds: float) -> str:
    """Seconds as text, in a suitable unit."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def settle(config: Config) -> Config:
    """The config with the name of its backend, after a check that device and backend can run here.

    Raises:
        ConfigError: they cannot, or the tracker is not installed; says why.
    """
    TRACKERS[config.tracker or "none"].check()  # None in runs of 0.2.0
    try:
        torch.zeros(1, device=config.device).item()  # not on "meta", for instance
        backend = backends.resolve(config.backend, torch.device(config.device)).name
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(f"cannot run on device {config.device!r}: {error}") from error
    return dataclasses.replace(config, backend=backend)


def check_graph(config: Config, graph: Graph) -> None:
    """Raises: ConfigError: the model cannot be tested on the graph's second graph."""
    if graph.inductive is not None and config.model in MODELS:
        raise ConfigError(
            f"{config.model} has no embeddings for the entities of a second graph, to test on; "
            f"models that need none: {', '.join(sorted(SCORERS.keys() - MODELS.keys()))}"
        )


@torch.no_grad()
def add_l3_gradient(parameter: Tensor, coefficient: float) -> None:
    """Add the gradient of coefficient · Σ|x|³ over the whole table: 3 · coefficient · x|x|."""
    assert parameter.grad is not None
    parameter.grad.addcmul_(parameter, parameter.abs(), value=3.0 * coefficient)


@contextmanager
def stop_signals(stop: threading.Event) -> Iterator[threading.Event]:
    """Let the first SIGINT or SIGTERM set the event; the second has its usual effect."""
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def request(number: int, frame: FrameType | None) -> None:
        restore()
        stop.set()
        # Not through sys.stderr: the signal may have come in the middle of a write to it.
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    if threading.current_thread() is threading.main_thread():  # other threads may set no handlers
        previous |= {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
