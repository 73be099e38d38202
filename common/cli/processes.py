"""One process or several of `accelerate launch`: which one this is, how they meet, and which of them may speak."""

import os
import sys
from typing import TextIO


def launched() -> tuple[int, int]:
    """The rank of this process and the world size, as the launcher has set them; (0, 1) without a launcher."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ.get("RANK", 0)) if world_size > 1 else 0), world_size


def silence() -> TextIO:
    """Close stdout and stderr of a process whose rank is not 0, libraries written in C included; return its real stderr."""
    errors = os.fdopen(os.dup(2), "w", errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    return errors


def join(device: str) -> None:
    """Join the process group, if there are several processes: gloo on CPUs, NCCL on GPUs. device: the flag."""
    if launched()[1] > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
    elif "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU") == "True":
        print("accelerate launch --cpu starts one process only; several, on CPUs too, are started by "
              "accelerate launch --multi_gpu --num_processes N", file=sys.stderr)


def leave() -> None:
    """Leave the process group, if there is one."""
    if launched()[1] > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()


def is_lost_connection(error: Exception) -> bool:
    """True for the errors that torch raises when another process of the group has ended."""
    if launched()[1] == 1:
        return False
    import torch.distributed

    return isinstance(error, torch.distributed.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)
