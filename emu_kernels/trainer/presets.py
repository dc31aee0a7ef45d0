"""Settings by name. Options given beside a preset override it.

A new preset is an entry of :data:`PRESETS`.
"""

from __future__ import annotations

import math
from typing import Any

from .models import MODELS
from .nbfnet import NBFNet

# A model on a dataset, as EMU's paper trains it (arXiv 2504.03327). EMU's settings are those that
# the authors publish for all their runs on FB15k-237 (they give the rate as 0.39, the share that a
# negative keeps). With --loss softmax it is the paper's baseline, with the model's regularization.
_EMU_PAPER: dict[str, Any] = {
    "dim": 100,
    "margin": 24.0,
    "loss": "emu",
    "mutation_rate": 0.61,
    "beta": 0.53,
    "alpha": 0.11,
    "batch_size": 1000,
    "negatives": 256,
    "optimizer": "Adagrad",
    "lr": 0.1,
    "steps": 100_000,
    "eval_every": 5000,
}

PRESETS: dict[str, dict[str, Any]] = {
    f"{model}-{dataset}".lower(): {
        "dataset": dataset,
        "model": model,
        **_EMU_PAPER,
        **MODELS[model].defaults,
    }
    for model in ("DistMult", "ComplEx", "TransE", "RotatE", "HAKE")
    for dataset in ("FB15k-237", "WN18RR")
}

# As NBFNet's authors train it on one device: 20 epochs, validated after every second one. Their
# temperature divides scores, ours multiplies them. fb237_v1 has the settings of A*Net's repository,
# as that paper has the figures to compare with; NBFNet's own file removes one-hop edges there.
for name, triples, settings in (
    ("FB15k-237", 272_115, {"adversarial_temperature": 2.0, "removed_edges": "one-hop"}),
    ("WN18RR", 86_835, {"relation_features": "table", "batch_size": 16}),
    ("fb237_v1", 4_245, {"adversarial_temperature": 2.0}),
    ("WN18RR_v1", 5_410, {"relation_features": "table"}),
):
    preset: dict[str, Any] = {"dataset": name, "model": "NBFNet", **NBFNet.defaults, **settings}
    epoch = triples / preset["batch_size"]
    PRESETS[f"nbfnet-{name}".lower()] = preset | {
        "steps": math.ceil(20 * epoch),
        "eval_every": math.ceil(2 * epoch),
    }
