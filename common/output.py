"""The CSV file that --output names: written as its rows come, and only over an earlier one of the same command."""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError

LONGEST_HEADER = 2**20  # characters


class Output:
    """A table that grows by some rows at a time.

    is_stdout: it goes to stdout, which --output names, as /dev/stdout does. A link is followed, and what is no file on a
    disk, such as a FIFO, is written into.
    """

    def __init__(self, name: str, header: str, inputs: Iterable[Path]):
        """header: regular expression of the first line of a file that may be replaced; inputs: files that never are.

        Raises UserError if something else is there. Nothing is opened for writing before there are rows.
        """
        self.path = Path(name)
        self.is_stdout = _is_stdout(self.path)
        self.stream: TextIO | None = sys.stdout if self.is_stdout else None
        self.begun = False
        if not self.is_stdout and (found := self._obstacle(header, inputs)):
            raise UserError(f"--output {name} {found} and is not replaced; choose another name")

    def _obstacle(self, header: str, inputs: Iterable[Path]) -> str:
        """What must not be replaced, in words; nothing if the file may be written."""
        try:
            if self.path.is_dir():
                return "is a folder"
            if not self.path.is_file():
                return ""
            if os.path.realpath(self.path) in map(os.path.realpath, inputs):
                return "is one of the images"
            with self.path.open(encoding="utf-8", errors="replace") as file:
                first = file.readline(LONGEST_HEADER)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return "" if not first or re.fullmatch(header, first) else "is a file that this command did not write"

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows, column -> value, before anything else is done. Raises UserError if the file does not take them."""
        import pandas as pd

        try:
            if self.stream is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.stream = self.path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
            pd.DataFrame(rows).to_csv(self.stream, header=not self.begun, index=False, float_format="%.6f", lineterminator="\n")
            self.begun = True
            self.stream.flush()
        except OSError as error:
            if self.is_stdout:
                raise
            raise UserError(f"--output {self.path} cannot be written ({error.strerror}); make room or choose another"
                            ) from error


def _is_stdout(path: Path) -> bool:
    """Whether this is another name of where stdout goes."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError, AttributeError):  # no such file, or a stdout that is no file
        return False
