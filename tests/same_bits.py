"""Write the results of random calls to a file; compare two such files bit for bit.

To show that a change keeps results on the CPU, run this with the package before and after it::

    python tests/same_bits.py record /tmp/before.pt --calls 2000
    python tests/same_bits.py record /tmp/after.pt --calls 2000
    python tests/same_bits.py compare /tmp/before.pt /tmp/after.pt

It uses public functions only, so it also runs with older versions.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import emu_kernels as emu

HALVES = {"dot": 1, "l1": 1, "l2": 1, "rotate": 2, "hake": 2, "protate": 1}
SCALES = {"l1": 1, "l2": 1, "hake": 2}  # a scale's width is D divided by this
WEIGHTS = {"hake": 2, "protate": 1}


def record(call: int) -> list[Tensor]:
    """All results of random call number ``call``, including gradients."""
    choose = random.Random(call)
    torch.manual_seed(call)
    similarity = choose.choice(list(HALVES))
    dtype = choose.choice(
        [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
    )
    groups = choose.choice([1, 2, 3, 7])
    batch = groups * choose.choice([1, 1, 2, 5])
    count = choose.choice([0, 1, 3, 16, 33, 257])
    dim = choose.choice([2, 6, 16, 34, 100, 130])
    rows = choose.choice([1, 5, 300])
    unit = choose.choice(["component", "pair"])
    rate: Any = choose.choice([0.0, 0.3, 0.61, 1.0, "tensor", emu.Mixup(choose.randint(1, 4))])
    if rate == "tensor":
        rate = torch.rand(dim // 2 if unit == "pair" else dim)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    query = torch.randn(batch, dim, dtype=real)
    table = torch.randn(rows, dim, dtype=real).to(dtype)
    positive = torch.randint(rows, (batch,))
    negative = torch.randint(-1 if choose.random() < 0.3 else 0, rows, (groups, count))
    options: dict[str, Any] = {"similarity": similarity}
    if similarity in SCALES and choose.random() < 0.6:
        options["scale"] = torch.rand(batch, dim // SCALES[similarity], dtype=real) + 0.5
    if similarity in WEIGHTS and choose.random() < 0.6:
        options["similarity_weights"] = torch.rand(WEIGHTS[similarity], dtype=real) + 0.5
    if similarity in ("hake", "protate"):
        options["phase_scale"] = choose.choice([1.0, 2.5])
    learned = [query, table, *(v for v in options.values() if isinstance(v, Tensor))]
    for tensor in learned:
        tensor.requires_grad_()
    mutation: dict[str, Any] = {
        "mask_unit": unit,
        "seed": choose.randrange(2**63),
        "row_offset": choose.choice([0, 5, 2**31]),
    }
    loss: dict[str, Any] = {
        "sample_weight": torch.rand(batch) if choose.random() < 0.4 else None,
        "reduction": choose.choice(["mean", "sum", "none"]),
    }
    options["sparse_grad"] = choose.random() < 0.4
    torch.set_num_threads(choose.choice([1, 2]))
    functions: list[Callable[[], Any]] = [
        lambda: emu.fused_emu_loss(
            query, table, positive, negative, mutation_rate=rate, beta=0.4, alpha=0.2,
            **options, **mutation, **loss,
        ),
        lambda: emu.fused_softmax_loss(query, table, positive, negative, **options, **loss),
        lambda: emu.emu_scores(
            query, table, positive, negative, mutation_rate=choose.choice([None, rate]), margin=0.5,
            **options, **mutation,
        ),
    ]  # fmt: skip
    out = choose.choice(functions)()
    outputs = [out] if isinstance(out, Tensor) else list(out)
    total = sum((o.nan_to_num(neginf=0.0) * torch.randn_like(o)).sum() for o in outputs)
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, learned, allow_unused=True)
    results = [*outputs, *(torch.zeros(()) if g is None else g for g in grads)]
    if not isinstance(rate, emu.Mixup):
        narrow = table.detach()
        cube = narrow[negative.clamp(min=0)].repeat_interleave(batch // groups, 0).requires_grad_()
        anchor = narrow[positive].requires_grad_()
        mutated = emu.emu_mutate(anchor, cube, mutation_rate=rate, **mutation)
        results += [mutated, *torch.autograd.grad(mutated.sum(), (anchor, cube))]
    return [r.detach().to_dense() if r.is_sparse else r.detach() for r in results]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.flatten().clone().view(torch.uint8).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True, dest="command")
    recorded = commands.add_parser("record")
    recorded.add_argument("file")
    recorded.add_argument("--calls", type=int, default=1000)
    compared = commands.add_parser("compare")
    compared.add_argument("before")
    compared.add_argument("after")
    options = parser.parse_args()
    if options.command == "record":
        torch.save([record(call) for call in range(options.calls)], options.file)
        print(f"{options.calls} calls of {emu.__file__}, version {emu.__version__}")
        return
    before, after = torch.load(options.before), torch.load(options.after)
    assert len(before) == len(after), f"{len(before)} and {len(after)} calls"
    tensors = 0
    for call, (a, b) in enumerate(zip(before, after, strict=True)):
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            same = x.shape == y.shape and x.dtype == y.dtype and _bytes(x) == _bytes(y)
            assert same, f"call {call}, result {place}: {x} and {y}"
            tensors += 1
    print(f"{len(before)} calls, {tensors} tensors: equal to the bit")


if __name__ == "__main__":
    main()
