"""The device of a run, and its processes: one, or several under `accelerate launch` that share images and have one writer."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch import Tensor

from common.cli.flags import HardwareFlags
from common.errors import UserError

Function = TypeVar("Function", bound=Callable)


def world_size() -> int:
    """How many processes work on this run together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def device_of(config: HardwareFlags) -> torch.device:
    """The device to compute on. Raises UserError if it does not exist."""
    if world_size() > 1:
        if config.device not in ("auto", "cpu"):
            raise UserError(f"--device {config.device} is one for several processes; leave it out or give --device cpu")
        return PartialState().device
    if config.device == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        probe = torch.zeros(1, device=config.device)
        probe.item()  # a device without values, such as meta, is of no use
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {config.device} cannot be used here ({str(error).splitlines()[0]})") from error


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
