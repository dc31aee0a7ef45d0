"""What test_distributed.py's processes run: `torchrun spread.py COMMAND...`, emu-train's arguments.

If the first argument is `die`, the second process ends in the middle of a run.
"""

from __future__ import annotations

import os
import shlex
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from emu_kernels.trainer import cli
from emu_kernels.trainer.loop import Trainer

DIES_AT = 25


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    commands = sys.argv[1:]
    if commands[0] == "die":
        commands.pop(0)
        step = Trainer._train_step

        def or_die(trainer: Trainer) -> None:
            if trainer.step == DIES_AT and dist.get_rank() == 1:
                os._exit(3)
            step(trainer)

        Trainer._train_step = or_die  # type: ignore
    status = max(cli.main(shlex.split(command)) for command in commands)
    dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    main()
