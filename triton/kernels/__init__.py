"""The fused operators in Triton, installed as ``emu_kernels.triton``.

masks.py draws, similarities.py scores, tiles.py puts both together for a tile of candidates; the
kernels are in forward.py, rows.py, backward.py and mutate.py, and launch.py calls them. The kernels
for messages on a graph are in relational.py, and messages.py calls them.
emu_kernels.backends.triton is the backend. The parent folder must never become a package: with the
repository's root on the path it would hide the real Triton.
"""
