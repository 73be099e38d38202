"""The settings of every script: one dataclass per script over shared groups of flags, which refuses what makes no sense."""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from common.cli.options import option
from common.cli.sources import ExpertFlags, SourceFlags
from common.errors import UserError
from common.files import check_unchained, is_unicode

DEMO_BACKBONE = Path(__file__).parents[1] / "demo" / "backbone"
DOCUMENTED_IMAGES = 2400  # for training, of each task of the documented experiment
FOLLOWING = ("epochs", "accumulation_steps", "augment")  # settings that follow from the number of training images
HIGHEST = 2**32 - 1  # of any number: what every generator of random numbers takes as a seed


@dataclass
class RunFlags:
    """Flags of every script."""

    _argument_group_name: ClassVar[str] = "run"
    demo_defaults: ClassVar[dict[str, Any]] = {"root": "demo", "model": str(DEMO_BACKBONE)}
    demo: bool = option(False, "use generated images, the small backbone in common/demo/backbone and short training")
    root: str = option(".", "folder that holds the datasets and Results/")
    seed: int = option(3407, "seed of every random number; the same seed gives the same files")
    model: str = option(
        "microsoft/beit-large-patch16-224", "pretrained image classifier made of linear layers, such as BEiT, ViT, DINOv2 or "
        "Swin: a name on the Hub or a folder")
    overwrite: bool = option(False, "make this script's own results anew")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            lowest = self.lowest.get(name)
            if lowest is not None and value is not None and not lowest <= value <= HIGHEST:  # also catches NaN
                raise UserError(f"--{name} must be at least {lowest} and at most {HIGHEST}, not {value}")
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not is_unicode(text):
                    raise UserError(f"--{name} {text} is no UTF-8; rename it")
        check_unchained(self.root, f"--root {self.root}")
        try:
            os.listdir(self.root)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"--root {self.root} cannot be used ({error.strerror}); choose another") from error

    def made_anew(self) -> set[str] | None:
        """Keys of the tasks whose results --overwrite makes anew; None for all."""
        return None

    # The smallest value that makes sense, by flag, for all groups below.
    lowest: ClassVar[dict[str, float]] = {
        "seed": 0, "epochs": 1, "batch_size": 1, "accumulation_steps": 1, "learning_rate": 0, "weight_decay": 0,
        "warmup_epochs": 0, "lora_rank": 1, "lora_alpha": 1, "gate_hidden": 1, "refuse": 0,
        "seeds": 1, "checkpoint_every_steps": 0,
    }


@dataclass
class HardwareFlags:
    """Where and how a model is computed."""

    _argument_group_name: ClassVar[str] = "hardware"
    device: str = option("auto", "auto takes a GPU if there is one; or cpu, cuda, cuda:1, mps")
    precision: Literal["auto", "bf16", "fp32"] = option(
        "auto", "precision of training; auto takes bf16 where the hardware computes in it. Evaluation is always in fp32"
    )


@dataclass
class TrainingFlags(HardwareFlags):
    """One training loop. Reference values: the documented experiment (Adam, batch 16 x 4)."""

    _argument_group_name: ClassVar[str] = "training"
    epochs: int | None = option(None, "passes over the training images; by default 25 where there are 2,400 or more, as in the "
                                      "documented experiment, down to 8 where there are 1,200 or fewer")
    batch_size: int = option(16, "images that are computed at once")
    accumulation_steps: int | None = option(
        None, "batches that make up one optimizer step; by default 4 where there are 2,400 training images or more, 2 from "
              "1,200 on, 1 below")
    learning_rate: float = option(2e-4, "peak learning rate of AdamW, reached after the warm-up, then cosine decay")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW; 0 is plain Adam")
    warmup_epochs: float = option(1.0, "epochs of linear warm-up")
    augment: bool | None = option(
        None, "mirror training images at random and shift them by up to an eighth; by default where there are fewer than 2,400 "
              "of them. Say no where a mirrored image is of another class")
    checkpoint_every_steps: int = option(
        0, "optimizer steps between checkpoints, from which the same command goes on; 0 is one at the end of every epoch"
    )
    largest_batch: bool = option(
        False, "compute a whole optimizer step at once, or the largest half, quarter ... of it that fits into memory"
    )
    gradient_checkpointing: bool = option(
        False, "compute each block's activations again in the backward pass instead of keeping them: less memory, more time"
    )

    def for_images(self, count: int) -> Self:
        """The same settings, with those that nobody has chosen as they follow from the number of training images.

        From 2,400 images on they are those of the documented experiment. Few images are seen in small steps, as there would be
        too few of these, and mirrored and shifted, as an adapter soon knows them by heart.
        """
        share = min(max(count / DOCUMENTED_IMAGES, 0.5), 1.0)
        values = round(25 - 34 * (1 - share)), 4 if share == 1 else 2 if share > 0.5 else 1, share < 1
        follows = dict(zip(FOLLOWING, values, strict=True))
        return dataclasses.replace(self, **{name: value for name, value in follows.items() if getattr(self, name) is None})


@dataclass
class LoraFlags:
    """The shape of the LoRA adapters."""

    _argument_group_name: ClassVar[str] = "LoRA"
    lora_rank: int = option(16, "rank of every adapter")
    lora_alpha: int = option(32, "adapters are scaled by alpha / rank")


@dataclass
class GateFlags:
    """The gates of the mixture."""

    _argument_group_name: ClassVar[str] = "gates"
    gate_hidden: int = option(128, "units of each gate's first layer")
    top_k: str = option(
        "auto", "experts that an image uses: a number, or 'all'; auto is all of up to 16 experts, and 1 where there are more")
    passes: Literal[1, 2] = option(
        1, "1: one pass, in which the first third of the blocks finds the experts and the others use them; 2: the plain "
           "backbone finds the expert, which answers in a second pass: more accurate, and takes twice as long")
    quick: bool = option(False, "a mixture from images alone: no adapters, the gates' knowledge of the classes is the answer")
    refuse: float = option(0.0, "answer 'none' to images that look less familiar than this share of the validation images does")
    add_expert: list[str] = option(
        [], "NAME=FOLDER: add the peft LoRA adapter in FOLDER to the finished mixture, by the images of the task NAME alone; "
            "NAME by itself adds an expert without an adapter")


@dataclass
class PreparationConfig(SourceFlags, RunFlags):
    """Settings of Data_Preparation.py."""


@dataclass
class BaseModelConfig(TrainingFlags, RunFlags):
    """Settings of Generate_Base_Model.py."""

    epochs: int = option(10, "penalties from strong to weak for which the head is fitted, the best by validation is taken; "
                             "with --learning_rate, passes over the training images' features")
    learning_rate: float | None = option(
        None, "train the head by AdamW at this rate (2e-4 in the documented experiment) instead of fitting it to the end")


@dataclass
class BenchmarkConfig(HardwareFlags, RunFlags):
    """Settings of Benchmark.py."""


@dataclass
class FinetuneConfig(TrainingFlags, RunFlags):
    """Settings of Finetune.py.

    The rate and its decay are those of the published fine-tuning of BEiT-large on ImageNet (Bao et al. 2022, official
    recipe: 2e-5, layer decay 0.9, cosine); 2e-4 on all layers is the documented experiment.
    """

    _argument_group_name: ClassVar[str] = "fine-tuning"
    learning_rate: float = option(2e-5, "peak learning rate of the head; see --layer_decay")
    layer_decay: float = option(0.9, "each block learns at this share of the rate of the block above it")
    demo_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-3, "layer_decay": 1.0, "epochs": 10}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"--layer_decay must be above 0 and at most 1, not {self.layer_decay}")


@dataclass
class LoraConfig(ExpertFlags, LoraFlags, TrainingFlags, RunFlags):
    """Settings of Lora_Finetune.py."""

    demo_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 2e-3, "epochs": 10}

    def made_anew(self) -> set[str] | None:
        """The tasks of --expert, if there are any: the others' experts stay."""
        return set(self.experts()) or None


@dataclass
class MixtureConfig(GateFlags, TrainingFlags, RunFlags):
    """Settings of CGM_Lora.py."""

    _argument_group_name: ClassVar[str] = "comparison"
    lowest: ClassVar[dict[str, float]] = {**RunFlags.lowest, "epochs": 0}
    epochs: int = option(
        10, "passes over the training images' features after the closed-form start, which is epoch 0; the best epoch is taken")
    learning_rate: float = option(1e-3, "learning rate of the gates")
    compare: bool = option(False, "also compare the mixture with no experts, routers, merges, joint training and an oracle")
    seeds: int = option(1, "how many times --compare trains whatever it trains, each with another seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick and (self.compare or self.add_expert):
            raise UserError("--quick makes a mixture without adapters; leave --compare and --add_expert out")
        if self.refuse >= 1:
            raise UserError(f"--refuse takes a share of the validation images, from 0 to below 1, not {self.refuse}")
        if self.top_k not in ("auto", "all") and not (self.top_k.isdecimal() and int(self.top_k)):
            raise UserError(f"--top_k takes a number of at least 1, 'all' or 'auto', not {self.top_k}")
        if self.compare and self.add_expert:
            raise UserError("--compare is of the mixture of the tasks' own experts; leave --add_expert out")
        for entry in self.add_expert:
            if not re.fullmatch(r"[\w-]+(=.+)?", entry):
                raise UserError(f"--add_expert takes NAME=FOLDER or NAME, of letters, digits, _ and -, not {entry}")
        if len(self.added_experts()) < len(self.add_expert):
            raise UserError("--add_expert: two of the experts have one name")

    def added_experts(self) -> dict[str, Path | None]:
        """The experts to add: name -> folder of the adapter, None for one without."""
        entries = (entry.partition("=") for entry in self.add_expert)
        return {name: Path(folder) if folder else None for name, _, folder in entries}


@dataclass
class RunAllConfig(ExpertFlags, SourceFlags, RunFlags):
    """Settings of `python -m common.run_all`: the flags it hands on, and how it runs the scripts."""

    _argument_group_name: ClassVar[str] = "order"
    demo_defaults: ClassVar[dict[str, Any]] = {"side_by_side": True, "quiet": True}
    side_by_side: bool = option(
        False, "run Finetune.py and Lora_Finetune.py at the same time, each with half of the CPU's threads: faster for small "
        "models, and takes the memory of both")
    quiet: bool = option(False, "one line a step in place of all that the scripts print")
    quick: bool = option(False, "only prepare the images and make a mixture of them without adapters, which needs no training")


@dataclass
class PredictConfig(HardwareFlags, RunFlags):
    """Settings of `python -m common.predict`."""

    _argument_group_name: ClassVar[str] = "prediction"
    images: list[str] = option([], "images, of any kind that Pillow opens, or folders of images", positional=True)
    model: str | None = option(None, "the backbone, a name on the Hub or a folder; by default the one the mixture was made on")
    mixture: str | None = option(None, "folder of a saved mixture; by default the finished one below --root")
    output: str | None = option(None, "CSV file to write the answers to")
    demo_defaults: ClassVar[dict[str, Any]] = {"model": None}


SCRIPTS: dict[str, type] = {
    "Data_Preparation": PreparationConfig,
    "Generate_Base_Model": BaseModelConfig,
    "Benchmark": BenchmarkConfig,
    "Finetune": FinetuneConfig,
    "Lora_Finetune": LoraConfig,
    "CGM_Lora": MixtureConfig,
}
