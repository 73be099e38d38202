"""Passes without gradients in batches that fit into memory."""

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from common.errors import UserError

Result = TypeVar("Result")


def in_batches(rows: Tensor, at_once: int, compute: Callable[[Tensor], Result]) -> Iterator[tuple[Tensor, Result]]:
    """Yield every batch of `rows` (N,) with what `compute` makes of it: `at_once` rows, or half of them, a quarter ... from
    where memory gives out. Raises UserError if memory does not suffice for one row."""
    while len(rows):
        batch, result = rows[:at_once], None
        try:
            result = compute(batch)
        except RuntimeError as error:
            _check_smaller(error, len(batch))
        if result is None:  # outside of the except block, where the error would keep the activations alive
            clear_device_cache()
            at_once = math.ceil(len(batch) / 2)
            continue
        yield batch, result
        rows = rows[len(batch):]


def with_smaller_batches(size: int, compute: Callable[[int], Result]) -> Result:
    """What `compute` makes of a batch size: `size`, or half of it, a quarter ... from where memory gives out. It begins anew
    each time. Raises UserError if memory does not suffice for one image."""
    while True:
        try:
            return compute(size)
        except RuntimeError as error:
            _check_smaller(error, size)
        clear_device_cache()  # outside of the except block, where the error would keep the activations alive
        size //= 2


def _check_smaller(error: RuntimeError, size: int) -> None:
    """Raise what ended the computation of a batch of this size, unless a smaller batch may fit."""
    if not should_reduce_batch_size(error):
        raise error
    if size == 1:
        raise UserError("out of memory for a single image; choose a smaller --model or another --device", own=True) from error
