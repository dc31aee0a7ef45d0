"""EMU as a training loop of PyKEEN: :class:`EMUTrainingLoop`, and its loss :func:`emu_loss`.

Importing this module registers the loop with PyKEEN, under the name ``"emu"``.
"""

from emu_kernels.integrations._require import require

MINIMUM = (1, 11, 1)  # 1.11.0 cannot be imported with a recent class_resolver

require("pykeen", MINIMUM, extra="pykeen")

from .loop import EMUTrainingLoop  # noqa: E402
from .loss import emu_loss  # noqa: E402
from .mapping import fused_similarity  # noqa: E402

__all__ = ["EMUTrainingLoop", "emu_loss", "fused_similarity"]
