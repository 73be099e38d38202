"""The checkpoint of one training: one file, from which a run that was interrupted resumes."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.files import writing
from common.provenance import changes, tensor_fingerprint
from common.training.distributed import on_main

FORMAT = 2


class Checkpoint:
    """A safetensors file of a training's tensors; its metadata hold the loop's state, what the training was made from
    and a checksum of it all.

    tensors, progress: what the file holds; progress is None, and tensors are empty, if there is no file.
    """

    def __init__(self, path: Path, made_from: dict[str, Any]):
        """Read the file if it is there. Raises UserError if it is damaged or was made from something else."""
        self.path, self.made_from = path, {**made_from, "checkpoint_format": FORMAT}
        self.tensors: dict[str, Tensor] = {}
        self.progress: dict[str, Any] | None = None
        if not path.exists():
            return
        try:
            with safe_open(path, "pt") as file:
                self.tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
            damaged = metadata["checksum"] != _checksum(self.tensors, metadata["state"])
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); allow it, then run the same command "
                            "again") from error
        except (SafetensorError, TypeError, KeyError):  # TypeError: no metadata at all
            damaged = True
        if damaged:
            raise UserError(f"{path} is damaged; delete it and run the same command again: this training then starts anew")
        state = json.loads(metadata["state"])
        for difference in changes(state["made_from"], self.made_from):
            raise UserError(f"{path} is the checkpoint of a run with {difference}; run with what it had to go on, or add "
                            "--overwrite to start anew")
        self.progress = state["progress"]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix` and a dot, by the rest of their names."""
        start = f"{prefix}."
        return {key.removeprefix(start): tensor for key, tensor in self.tensors.items() if key.startswith(start)}

    @on_main
    def save(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Put a later state into the file. Raises UserError if the disk does not take it."""
        state = json.dumps({"made_from": self.made_from, "progress": progress})
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with writing(self.path) as part:
            save_file(tensors, part, {"state": state, "checksum": _checksum(tensors, state)})
            with part.open("rb") as file:  # so that a power cut leaves the earlier file or this one
                os.fsync(file.fileno())

    @on_main
    def delete(self) -> None:
        """Forget this training."""
        self.path.unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor], state: str) -> str:
    return hashlib.sha256((tensor_fingerprint(tensors) + state).encode()).hexdigest()
