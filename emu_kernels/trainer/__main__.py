"""``python -m emu_kernels.trainer`` is ``emu-train``, as ``torchrun -m`` calls it."""

import sys

from .cli import main

sys.exit(main())
