"""Mixtures on the Hugging Face Hub: fetched by name, uploaded with a card."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCardData, snapshot_download

from ContextGatedMOE.errors import MixtureError


def download(name: str, revision: str | None, subfolder: str, files: Sequence[str], **options: Any) -> Path:
    """Fetch those of a mixture's files that are there. Returns the folder of the whole repository.

    options: arguments of `snapshot_download`. Raises MixtureError if there is no such folder here and nothing on the Hub.
    """
    if Path(name).is_absolute() or name.count("/") != 1:
        raise MixtureError(f"there is no saved mixture in {name}: no such folder, and a Hub name is OWNER/NAME")
    try:
        wanted = [Path(subfolder, file).as_posix() for file in files]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, **options))
    except Exception as error:  # huggingface_hub and httpx raise many kinds
        raise MixtureError(f"there is no folder {name} here, and it cannot be fetched from the Hub: "
                           f"{' '.join(str(error).split())[:300]}") from error


class Sharing:
    """`push_to_hub` and `model_card` of a mixture."""

    def push_to_hub(self, repo_id: str, *, figures: Mapping[str, Any] | None = None, made: str = "", revision: str | None = None,
                    token: str | bool | None = None, private: bool | None = None, create_pr: bool = False,
                    commit_message: str = "Upload a context gated mixture of experts") -> str:
        """Upload what `save_pretrained` writes, and `model_card` as README.md, to a repository, which is made if there is none.

        figures, made: as for `model_card`. The other arguments are those of huggingface_hub's `upload_folder` and
        `create_repo`. Returns the address of the commit.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            (Path(folder) / "README.md").write_text(self.model_card(figures, made, repo_id), encoding="utf-8")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
                                         commit_message=commit_message))

    def model_card(self, figures: Mapping[str, Any] | None = None, made: str = "", repo_id: str = "OWNER/NAME") -> str:
        """A README.md for the Hub: base, experts, classes, how the mixture was made, and its figures.

        figures: what was measured, by name, such as {"accuracy on 800 test images": 0.95}. made: sentences on how it was made,
        besides what the mixture knows itself. repo_id: its name in the example.
        """
        base = getattr(self.base_model, "name_or_path", "") or ""
        on_images = getattr(self.base_model, "main_input_name", "") == "pixel_values"
        data = ModelCardData(library_name="context-gated-moe", tags=["lora", "mixture-of-experts", "peft"],
                             base_model=base if base.count("/") == 1 and not Path(base).exists() else None,
                             pipeline_tag="image-classification" if on_images and self.classes else None)
        experts = []
        for name in self.expert_names:
            statistics = next(iter(self.statistics.get(name, {}).values()), None)
            experts.append((name, ", ".join(self.classes[name]) if self.classes else "of one label space",
                            "none" if statistics is None else int(statistics.counts.sum())))
        fitted = ("The gates start from linear discriminants of the experts' classes, in closed form from sums over the images "
                  "above." if self.statistics else "The gates have not been fitted in closed form.")
        lines = ["---", data.to_yaml(), "---", "", "# Context gated mixture of LoRA experts", "",
                 f"{len(experts)} frozen LoRA experts on {base or type(self.base_model).__name__} in one model, weighed for each "
                 "input by gates, without a task label.", ""]
        lines += _table(("expert", "classes", "images seen by the gates"), experts)
        lines += ["## How it was made", "", f"{fitted} {made}".strip(), ""]
        if figures:
            lines += ["## Figures", "", *_table(("what", "figure"), figures.items())]
        lines += ["## How to use it", "", "```python", "from ContextGatedMOE import ContextGatedMOE", "",
                  f"model = ContextGatedMOE.from_pretrained({json.dumps(repo_id)})", "```", ""]
        return "\n".join(lines)


def _table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table, and an empty one."""
    cells = [[" ".join(str(value).replace("|", "\\|").split()) for value in row] for row in (titles, ["---"] * len(titles), *rows)]
    return [*(f"| {' | '.join(row)} |" for row in cells), ""]
