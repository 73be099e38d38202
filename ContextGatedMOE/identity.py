"""Which base model a mixture belongs to: known by its weights, whatever floating-point type they are loaded in."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ContextGatedMOE import building
from ContextGatedMOE.errors import MixtureError

DTYPES = ("float32", "bfloat16", "float16")


def plain_state(base_model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A base model's own parameters and saved buffers by their plain names, whether or not it is part of a mixture."""
    layers = building.mixture_layers(base_model)
    for name, tensor in base_model.state_dict().items():
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if owner is not None:
            if name.startswith(f"{owner}.base."):
                yield f"{owner}.{name.removeprefix(f'{owner}.base.')}", tensor
        elif f"{building.GATE}." not in name:
            yield name, tensor


def fingerprint(base_model: nn.Module, heads: Sequence[str], dtype: str | None = None) -> str:
    """SHA-256 over a model's own parameters and saved buffers, without the layers named `heads`.

    dtype: one of `DTYPES` to which floating-point tensors are rounded first; None for as they are.
    """
    digest, replaced = hashlib.sha256(), tuple(f"{name}." for name in heads)
    for name, tensor in sorted(plain_state(base_model), key=lambda entry: entry[0]):
        if name.startswith(replaced):
            continue
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, dtype))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dtype_of(base_model: nn.Module) -> str:
    """The type of a model's first parameter, such as "float32"."""
    return str(next(base_model.parameters()).dtype).removeprefix("torch.")


def is_same(base_model: nn.Module, config: Mapping[str, Any]) -> bool:
    """Whether a base model has the weights that a mixture's configuration tells of, or what rounding makes of the same weights.

    A fingerprint of every type was kept, so this is no matter of tolerance. Only bf16 and fp16 of one fp32 model cannot be
    known to belong together.
    """
    heads, saved, own = config["heads"], config["base_dtype"], dtype_of(base_model)
    if fingerprint(base_model, heads) == config["base_fingerprint"]:
        return True
    # The base was rounded from what was saved, or widened; or what was saved had been rounded from this base.
    tried = () if own == saved else (own, saved) if own == "float32" else (own,)
    return any(fingerprint(base_model, heads, dtype) == config["base_rounded"].get(dtype) for dtype in tried if dtype in DTYPES)


def base_place(base_model: nn.Module) -> tuple[str | None, str | None]:
    """Where a base model was loaded from, so that it is found from anywhere: an absolute folder, or a Hub name and its commit.

    None, None for a model without a name.
    """
    name = getattr(base_model, "name_or_path", "") or None
    if name is not None and Path(name).is_dir():
        return str(Path(name).absolute()), None
    return name, getattr(getattr(base_model, "config", None), "_commit_hash", None)


def load_base(folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """Load the transformers model the mixture was saved on, as it was published; the experts bring their heads.

    The Hub is asked only for a commit that was saved: a path that is not there any more may be the name of somebody else's
    model. What is in the cache is not fetched again. Raises MixtureError if it cannot be loaded.
    """
    name, kind = config["base_model"], getattr(transformers, config["base_class"], None)
    if not name or not hasattr(kind, "from_pretrained"):
        raise MixtureError(f"{folder} was made on a {config['base_class']} that cannot be loaded by name; pass base_model=...")
    commit = None if Path(name).is_dir() else config["base_commit"]
    given = {"dtype": config["base_dtype"], **options, "revision": commit or "main"}
    given["local_files_only"] = commit is None or options.get("local_files_only", False)
    try:
        with quiet():
            return kind.from_pretrained(name, **given)
    except Exception as error:  # transformers raises many kinds for what is missing or does not fit
        reason = " ".join(str(error).split())[:300]
        raise MixtureError(f"the base model {name} of {folder} cannot be loaded; pass base_model=... ({reason})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No table of head weights that are new, which is as it should be in a base of experts, and no progress bar."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
