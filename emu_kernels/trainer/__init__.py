"""Train and evaluate knowledge-graph embeddings with the fused EMU loss.

A thin trainer: ordinary PyTorch around one call of :func:`emu_kernels.fused_emu_loss` a step.

================= ====================================================================
``data``          triples and vocabularies; ``reading`` reads files and archives
``names``         names as one tensor of bytes
``datasets``      the public datasets by name: addresses, checksums, cache
``models``        a query for each model, and the similarity that compares it
``nbfnet``        NBFNet, which scores entities by the paths to them
``initial``       given initial vectors of entities
``losses``        the objectives of a step
``batches``       seeds, and batches as functions of (seed, step)
``frequency``     Bernoulli batches, subsampling weights
``sampling``      negatives as functions of (seed, step, batch), filtering
``neighbourhood`` structure-aware negatives
``presets``       settings by name
``config``        all settings of a run; ``settings`` turns them into flags and checks
``evaluation``    filtered ranking in both directions
``breakdown``     metrics by relation
``trackers``      where metrics are logged besides the run folder
``schedule``      learning rates, and the change of optimizer
``loop``          the training loop
``distributed``   the loop on the processes of ``torchrun``; ``shards`` are its checkpoints
``run``           the run folder: config, metrics, checkpoints, embeddings
``checkpoint``    files that stay readable if the program is killed at any moment
``report``        tables and plots of metrics; ``page`` is a run's report as HTML
``cli``           ``emu-train``
``predict``       ``emu-predict``
``terminal``      what both do if their output cannot be written
================= ====================================================================
"""

from importlib.util import find_spec

_missing = [
    name
    for name in ("matplotlib", "pooch", "pyarrow", "safetensors", "tabulate", "tqdm")
    if find_spec(name) is None
]
if _missing:
    raise ModuleNotFoundError(
        f"the trainer needs {', '.join(_missing)}: pip install 'emu-kernels[trainer]'"
    )
