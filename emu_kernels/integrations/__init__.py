"""EMU in trainers that exist already. Nothing here is imported unless it is asked for.

:mod:`emu_kernels.integrations.pykeen` is a training loop for PyKEEN's pipeline (docs/pykeen.md).
"""
