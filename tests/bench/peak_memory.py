"""The most memory that this process has held since a point in time."""

from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_HIGHEST = "5"  # proc(5): put the highest resident size back to the present one


class PeakMemory:
    """The most memory held since it was made or restarted: a GPU's if one is used, else the process's own."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was held before."""
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        try:
            CLEAR.write_text(RESET_HIGHEST)
            self._told = True
        except OSError:  # another system than Linux, or not allowed
            self._told = False

    def mib(self) -> float | None:
        """The peak in MiB; None where the system tells only that of the process's whole life."""
        if torch.cuda.is_initialized() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated() / 2**20
        if not self._told:
            return None
        return next(int(line.split()[1]) / 2**10 for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
