"""The experiments of :mod:`bench.study`: which runs each has, and how its table names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from bench import mask_rules
from emu_kernels.trainer.nbfnet import NBFNet
from emu_kernels.trainer.presets import PRESETS
from emu_kernels.trainer.sampling import ALL

Settings = dict[str, Any]
Names = dict[str, str]
Run = tuple[Settings, Names]

SEEDS = (0, 1, 2)
MODELS = ("DistMult", "ComplEx", "TransE", "RotatE", "HAKE")

# The contenders. Each has the settings that EMU's authors publish for all their runs, or those of
# its own paper, so that none is tuned more than another here.
LOSSES: dict[str, Settings] = {
    "softmax": {"loss": "softmax"},
    "ULS": {"loss": "uls"},
    "EMU": {"loss": "emu"},
    "EMU, closed form": {"loss": "expected"},
    "Mixup": {"loss": "mixup"},
    "softmax, SAN": {"loss": "softmax", "sampler": "structure-aware"},
    "EMU, SAN": {"loss": "emu", "sampler": "structure-aware"},
    "self-adversarial": {"loss": "selfadv"},
}


SMALL_GRAPH: Settings = {"steps": 5000, "eval_every": 250}
# With a quarter of the preset's batch EMU came to the same MRR in half the time, in one trial.
ALL_ENTITIES: Settings = {
    "batch_size": 250, "lr": 0.2, "schedule": "cosine", "steps": 5000, "eval_every": 500,
    "negatives": ALL, "filter_negatives": True, "regularization": 0.0,
}  # fmt: skip
RATES = (0.2, 0.4, 0.61, 0.8, 0.95)
BETAS = (0.0, 0.1, 0.25, 0.53, 1.0)
ALPHAS = (0.0, 0.03, 0.11, 0.3, 0.7)


def short(preset: str) -> Settings:
    """A tenth of the authors' steps, at twice their rate, which falls along a cosine.

    Of the schedules tried ("schedules" below) this is the best for EMU and as good as any for
    softmax; after so few steps, the authors' change to Adam is worse than no change.
    """
    settings = PRESETS[preset.lower()]
    changes = {"steps": 10_000, "eval_every": 1000, "schedule": "cosine", "lr": 2 * settings["lr"]}
    return settings | changes


class Experiment(NamedTuple):
    """An entry of :data:`EXPERIMENTS`: one table.

    Attributes:
        text: the question that it asks.
        lines: the settings of each line, and its names in the table.
        seeds: each line is trained with each of them.
    """

    text: str
    lines: Callable[[], Iterable[Run]]
    seeds: tuple[int, ...] = SEEDS

    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that the first results come early."""
        lines = list(self.lines())
        return [(line | {"seed": seed}, names) for seed in self.seeds for line, names in lines]


SEVERAL_SEEDS = tuple(product(("FB15k-237",), MODELS[:4]))
ONE_SEED = (("FB15k-237", "HAKE"), *product(("WN18RR",), MODELS))


def _losses(pairs: Iterable[tuple[str, str]], steps: int) -> Iterable[Run]:
    for dataset, model in pairs:
        preset = short(f"{model}-{dataset}") | {"steps": steps}
        for name, settings in LOSSES.items():
            yield preset | settings, {"graph": dataset, "model": model, "trained with": name}


def _longer() -> Iterable[Run]:
    for name in ("softmax", "ULS", "EMU", "EMU, closed form"):
        yield short("distmult-wn18rr") | LOSSES[name], {"trained with": name}


def _over_all() -> Iterable[Run]:
    """All entities as negatives, where only the quotient of alpha and beta matters."""
    for model in MODELS[:2]:
        preset = PRESETS[f"{model}-fb15k-237".lower()] | ALL_ENTITIES
        for name, loss in (("softmax", "onevsall"), ("ULS", "uls"), ("EMU", "expected")):
            yield preset | {"loss": loss}, {"model": model, "trained with": f"1-vs-all {name}"}


def _over_all_varied() -> Iterable[Run]:
    preset = PRESETS["distmult-fb15k-237"] | ALL_ENTITIES | {"loss": "expected"}
    changes: dict[str, Settings] = {
        "nothing": {},
        "inverse relations": {"inverse_relations": True},
        **{f"alpha {a:g}": {"alpha": a} for a in (0.03, 0.3)},
        **{f"mutation rate {r:g}": {"mutation_rate": r} for r in (0.4, 0.8)},
        "L3 1e-05": {"regularization": 1e-5},
        "learning rate 0.1": {"lr": 0.1},
    }
    for name, change in changes.items():
        yield preset | change, {"changed": name}


def _sensitivity() -> Iterable[Run]:
    preset = short("distmult-fb15k-237") | {"loss": "expected", "steps": 5000}
    grids = (("mutation_rate", RATES, "beta", BETAS), ("alpha", ALPHAS, "beta", BETAS))
    for first, values, second, others in grids:
        for a, b in product(values, others):
            names = {"varied": f"{first}, {second}", first: f"{a:g}", second: f"{b:g}"}
            other = {"mutation_rate": "0.61", "alpha": "0.11"}
            yield preset | {first: a, second: b}, other | names


def _graphs() -> Iterable[Run]:
    for dataset, model in product(("CoDEx-S", "umls", "kinship"), MODELS[:2]):
        preset = short(f"{model}-fb15k-237") | SMALL_GRAPH | {"dataset": dataset}
        for name in ("softmax", "ULS", "EMU", "EMU, closed form"):
            yield preset | LOSSES[name], {"graph": dataset, "model": model, "trained with": name}


def _nbfnet() -> Iterable[Run]:
    """The authors' settings, until two validations in a row bring no improvement."""
    # Steps between validations (an epoch, or half of one for CoDEx-S), and the most validations.
    lengths = {
        "fb237_v1": (67, 6), "WN18RR_v1": (85, 4), "umls": (82, 10), "kinship": (134, 5),
        "CoDEx-S": (257, 2),
    }  # fmt: skip
    emu: Settings = {"mutation_rate": 0.61, "beta": 0.53, "alpha": 0.11}
    losses = {"its own": "selfadv", "softmax": "softmax", "ULS": "uls", "EMU": "emu"}
    for (dataset, (every, times)), name in product(lengths.items(), losses):
        preset = PRESETS.get(f"nbfnet-{dataset}".lower(), NBFNet.defaults)
        length = {
            "model": "NBFNet",
            "dataset": dataset,
            "steps": every * times,
            "eval_every": every,
            "patience": 2,
        }
        yield (
            preset | emu | length | {"loss": losses[name]},
            {"graph": dataset, "trained with": name},
        )


def _parts() -> Iterable[Run]:
    parts: dict[str, Settings] = {
        "softmax": LOSSES["softmax"],
        **{f"ULS, beta {b:g}": LOSSES["ULS"] | {"beta": b} for b in (0.2, 0.53, 1.0)},
        "EMU, means alone": {"loss": "mean-alone"},
        "EMU, closed form": LOSSES["EMU, closed form"],
        "EMU": LOSSES["EMU"],
    }
    for model, (name, settings) in product(MODELS[:2], parts.items()):
        preset = short(f"{model}-fb15k-237")
        yield preset | settings, {"model": model, "trained with": name}


def _dimensions() -> Iterable[Run]:
    preset = short("distmult-fb15k-237")
    for dim, name in product((100, 500), ("softmax", "EMU, closed form")):
        yield preset | LOSSES[name] | {"dim": dim}, {"trained with": name, "d": str(dim)}


def _mask_rules() -> Iterable[Run]:
    preset = short("distmult-fb15k-237")
    yield preset | LOSSES["EMU"], {"mutated more": "none, drawn masks"}
    yield preset | LOSSES["EMU, closed form"], {"mutated more": "none"}
    for mutated, model, loss in mask_rules.LINES:
        yield preset | {"model": model, "loss": loss}, {"mutated more": mutated}


def _schedules() -> Iterable[Run]:
    base = PRESETS["distmult-fb15k-237"] | {"steps": 10_000, "eval_every": 1000}
    schedules: dict[str, Settings] = {
        "constant": {},
        "Adam from half on": {"switch_to": "Adam"},
        "cosine": {"schedule": "cosine"},
        "cosine, lr 0.2": {"schedule": "cosine", "lr": 0.2},
    }
    for schedule, name in product(schedules, ("softmax", "EMU, closed form")):
        yield (
            base | LOSSES[name] | schedules[schedule],
            {"trained with": name, "learning rate": schedule},
        )


EXPERIMENTS = {
    "schedules": Experiment("Which schedule lets 10,000 steps converge?", _schedules, (0,)),
    "losses": Experiment(
        "Which loss is best, model by model? (the paper's table 8)",
        partial(_losses, SEVERAL_SEEDS, 10_000),
    ),
    "losses-once": Experiment(
        "The same, with one seed and half of the steps. (57 epochs of WN18RR, 18 of FB15k-237)",
        partial(_losses, ONE_SEED, 5000), (0,),
    ),
    "longer": Experiment("DistMult on WN18RR with 10,000 steps instead of 5,000.", _longer, (0,)),
    "1-vs-all": Experiment("The same over all entities, not a sample.", _over_all),
    "1-vs-all-varied": Experiment(
        "What decides over all entities? DistMult with EMU, one change at a time.",
        _over_all_varied, (0,),
    ),
    "graphs": Experiment("Beyond the two benchmarks.", _graphs, (0,)),
    "sensitivity": Experiment(
        "What do rate, beta and alpha decide? (table 13; beta 0 is no label smoothing)",
        _sensitivity, (0,),
    ),
    "parts": Experiment(
        "Which part of the loss gives which part of MRR and of the mean rank?", _parts, (0,)
    ),
    "mask-rules": Experiment(
        "Are there better masks than random ones? (open question 1 of the paper)", _mask_rules, (0,)
    ),
    "nbfnet": Experiment("NBFNet: does EMU help where entities have no embeddings?", _nbfnet),
    "dimensions": Experiment("Does EMU at d = 100 equal softmax at d = 500?", _dimensions, (0,)),
}  # fmt: skip


def tiny(settings: Settings) -> Settings:
    """A run of seconds that takes the same path through the code."""
    small = {"dataset": "nations", "dim": 4, "batch_size": 64, "steps": 4, "eval_every": 2}
    small |= {"negatives": settings["negatives"] if settings["negatives"] == ALL else 4}
    return settings | small
