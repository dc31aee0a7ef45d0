"""EMU for PyTorch Geometric: :func:`emu_loss` for the models of ``torch_geometric.nn.kge``,
:func:`node2vec_loss` for Node2Vec."""

from emu_kernels.integrations._require import require

MINIMUM = (2, 4)  # the first with all four models

require("torch_geometric", MINIMUM, extra="pyg")

from .loss import emu_loss  # noqa: E402
from .node2vec import node2vec_loss  # noqa: E402

__all__ = ["emu_loss", "node2vec_loss"]
