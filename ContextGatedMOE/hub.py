"""Mixtures on the Hugging Face Hub: fetched by name, uploaded with a card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from ContextGatedMOE.adapters import MixtureError


def download(name: str, revision: str | None, subfolder: str, files: Sequence[str], **options: Any) -> Path:
    """Fetch a mixture's files, of which all but the first may be missing. Returns the folder of the whole repository.

    options: arguments of `hf_hub_download`. Raises MixtureError if there is no such folder here and no such mixture on the Hub.
    """
    try:
        if Path(name).is_absolute() or name.count("/") != 1:
            raise HFValidationError("a Hub name is OWNER/NAME")
        validate_repo_id(name)
    except HFValidationError as error:
        raise MixtureError(f"there is no saved mixture in {name}: no such folder, and {error}") from error
    first = None
    for file in files:
        try:
            found = Path(hf_hub_download(name, file, revision=revision, subfolder=subfolder or None, **options))
            first = first or found
        except EntryNotFoundError as error:
            if first is None:
                raise MixtureError(f"{name} on the Hub holds no mixture: {file} is missing") from error
        except Exception as error:  # huggingface_hub and httpx raise many kinds
            raise MixtureError(f"there is no folder {name} here, and it cannot be fetched from the Hub: "
                               f"{' '.join(str(error).split())[:300]}") from error
    return first.parents[len(Path(subfolder).parts)]


def upload(folder: str, repo_id: str, revision: str | None, token: str | bool | None, private: bool | None, message: str,
           create_pr: bool) -> str:
    """Upload a folder, to a repository that is made if there is none. Returns the address of the commit."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return str(
        api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message, create_pr=create_pr)
    )


def card(model: nn.Module, figures: Mapping[str, Any], made: str, repo_id: str) -> str:
    """See `ContextGatedMOE.model_card`."""
    base = getattr(model.base_model, "name_or_path", "") or ""
    image = model.base_model.main_input_name == "pixel_values" if hasattr(model.base_model, "main_input_name") else False
    head = ["---", "library_name: context-gated-moe", "tags: [lora, mixture-of-experts, peft]"]
    head += [f"base_model: {json.dumps(base)}"] if base.count("/") == 1 and not Path(base).exists() else []
    head += ["pipeline_tag: image-classification"] if image and model.classes else []
    lines = [
        *head,
        "---",
        "",
        "# Context gated mixture of LoRA experts",
        "",
        f"{len(model.expert_names)} frozen LoRA experts on {base or type(model.base_model).__name__} in one model, weighed "
        "for each input by gates that are never told the task.",
        "",
        "| expert | classes | images seen by the gates |",
        "|---|---|---|",
    ]
    for name in model.expert_names:
        classes = ", ".join(model.classes[name]) if model.classes else "of one label space"
        seen = next(iter(model.statistics.get(name, {}).values()), None)
        lines.append(f"| {_cell(name)} | {_cell(classes)} | {'none' if seen is None else int(seen.counts.sum())} |")
    fitted = (
        "The gates start from linear discriminants of the experts' classes, in closed form from sums over the images above."
        if model.statistics
        else "The gates have not been fitted in closed form."
    )
    lines += ["", "## How it was made", "", " ".join(part for part in (fitted, made.strip()) if part)]
    if model.top_k:
        lines += [f"Of every input the {model.top_k} most weighted experts are used."]
    if figures:
        lines += ["", "## Figures", "", "| what | figure |", "|---|---|"]
        lines += [f"| {_cell(what)} | {_cell(value)} |" for what, value in figures.items()]
    lines += ["", "## How to use it", "", "```python", "from ContextGatedMOE import ContextGatedMOE", "",
              f"model = ContextGatedMOE.from_pretrained({json.dumps(repo_id)})", "```", ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())
