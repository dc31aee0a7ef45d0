"""EMU in LibKGE: training jobs for its configuration files (docs/libkge.md).

LibKGE finds the jobs and their options by this module's name under ``modules``:

- ``import: [emu]`` with ``train.type: emu``: negative sampling, :class:`TrainingJobEMU`
- ``import: [emu_1vsAll]`` with ``train.type: emu_1vsAll``: all entities,
  :class:`TrainingJobEMU1vsAll`
"""

from importlib.util import find_spec

if find_spec("kge") is None:
    raise ImportError(
        "LibKGE is not installed. It is not on PyPI: clone https://github.com/uma-pi1/kge and "
        "install it from there with: pip install -e .",
        name="kge",
    )

from .jobs import TrainingJobEMU, TrainingJobEMU1vsAll
from .scorers import fused_similarity

__all__ = ["TrainingJobEMU", "TrainingJobEMU1vsAll", "fused_similarity"]
