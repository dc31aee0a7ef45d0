"""EMU for the models of PyTorch Geometric's ``torch_geometric.nn.kge``: :func:`emu_loss`."""

from emu_kernels.integrations._require import require

MINIMUM = (2, 4)  # the first with all four models

require("torch_geometric", MINIMUM, extra="pyg")

from .loss import emu_loss  # noqa: E402

__all__ = ["emu_loss"]
