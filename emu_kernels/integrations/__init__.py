"""EMU in other libraries' trainers. Import the module that you need:

- :mod:`emu_kernels.integrations.pykeen`: a training loop for PyKEEN's pipeline (docs/pykeen.md)
- :mod:`emu_kernels.integrations.libkge`: training jobs for LibKGE's configurations (docs/libkge.md)
- :mod:`emu_kernels.integrations.pyg`: the loss of PyTorch Geometric's models (docs/pyg.md)
- :mod:`emu_kernels.integrations.torchrec`: a table on several machines (docs/distributed.md)
"""
