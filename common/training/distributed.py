"""The processes of a run: one, or several under `accelerate launch` that share out the images and have one writer."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather, reduce
from accelerate.utils.environment import get_cpu_distributed_information
from torch import Tensor

Function = TypeVar("Function", bound=Callable)


def launched() -> tuple[int, int]:
    """Which of how many processes this is, by the environment that a launcher has set."""
    by_launcher = get_cpu_distributed_information()
    return by_launcher.rank, by_launcher.world_size


def hush() -> None:
    """Let one process speak for all; in the others, sys.__stderr__ still leads to where people look."""
    if launched()[0]:
        sys.__stderr__ = os.fdopen(os.dup(2), "w")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # of the libraries in C too
            os.dup2(nowhere, stream)
    if launched()[1] == 1 and "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU") == "True":
        print("accelerate launch --cpu starts one process only; several, on CPUs too, are started by "
              "accelerate launch --multi_gpu --num_processes N", file=sys.stderr)


def join(device: str) -> None:
    """Meet the other processes of this run, if there are others: over gloo on CPUs, over NCCL on GPUs. device: the flag."""
    if launched()[1] > 1:
        PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())


def part() -> None:
    """Leave the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes work on this run together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_main(function: Function) -> Function:
    """Let only the main process do this; for the others it does nothing and returns None."""
    @wraps(function)
    def on_main_only(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named) if rank() == 0 else None

    return on_main_only


def any_of(flag: bool) -> bool:
    """True if it is true in any process. A barrier: all processes wait for each other."""
    return flag if world_size() == 1 else all_reduce([torch.tensor(float(flag), device=PartialState().device)])[0].item() > 0


def all_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """The sum of each of these tensors over all processes."""
    return tensors if world_size() == 1 else reduce(tensors, "sum")


def share(total: int) -> tuple[Tensor, int]:
    """The rows of `total` that are this process's, and how many of them count.

    All processes have equally many; where that does not come out even, the last row is repeated and does not count.
    """
    each = -(-total // world_size())
    first = rank() * each
    return torch.arange(first, first + each).clamp_max(total - 1), min(max(total - first, 0), each)


def gathered(own: Tensor, total: int) -> Tensor:
    """What belongs to all `total` rows, in order, from what belongs to the rows of this process's share."""
    return own if world_size() == 1 else gather(own.to(PartialState().device))[:total]


def lost(error: Exception) -> bool:
    """True if this is how the end of another process looks from here."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def end(line: str, status: int) -> NoReturn:
    """Say why the run ends, once for all processes, and end this one."""
    if launched()[1] == 1:
        print(line, file=sys.stderr)
        sys.exit(status)
    if _is_first():
        print(line, file=sys.__stderr__, flush=True)
    os._exit(status)  # without waiting for the others


def _is_first() -> bool:
    """True in the process that asks first. Before they have met, all have the same reason, and the main one tells it."""
    if not dist.is_initialized():
        return launched()[0] == 0
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=2))
        return store.add("ended", 1) == 1
    except RuntimeError:  # the process that kept it has ended, and told why
        return False
