"""Make the demo backbone: pretrain a small BEiT to tell fractals and textures apart (`python -m common.demo.pretrain`).

Labels come from the formulas that drew the image, so no picture of any task is seen. Sources: Kataoka et al., "Pre-training
without Natural Images" (ACCV 2020); Nakashima et al., "Can Vision Transformers Learn without Natural Images?"
(AAAI 2022). The result is an ordinary Hugging Face folder, a classifier of fractals, loaded by the same code
that loads `microsoft/beit-*`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import BeitConfig, BeitForImageClassification, BeitImageProcessorPil

from common.demo.fractals import Textures, compose, draw_figures, sample_system

FOLDER = Path(__file__).parent / "backbone"
IMAGE_SIZE = 64


def backbone_config(figure_classes: int) -> BeitConfig:
    """BEiT in small: 1.2 million parameters, relative position bias, layer scale, mean pooling.

    Narrow layers need a wider initialisation than BEiT's 0.02, or the first features are little but mean colour.
    """
    return BeitConfig(
        image_size=IMAGE_SIZE, patch_size=8, hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=512, use_relative_position_bias=True, layer_scale_init_value=1.0, drop_path_rate=0.0,
        use_mean_pooling=True, initializer_range=0.06, id2label={i: f"fractal {i}" for i in range(figure_classes)},
    )


def image_processor() -> BeitImageProcessorPil:
    """The processor of the published BEiT classifiers, at this backbone's size: straight resize, mean = std = 0.5."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return BeitImageProcessorPil(
        size=size, crop_size=size, resample=2, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def draw_all_figures(classes: int, per_class: int, seed: int) -> torch.Tensor:
    """Figures of every class: (classes, per_class, 1, F, F) uint8."""
    figures = [
        draw_figures(sample_system(np.random.default_rng([seed, 0, c])), per_class, np.random.default_rng([seed, 1, c]))
        for c in tqdm(range(classes), desc="fractals", unit="class")
    ]
    return torch.from_numpy(np.stack(figures))[:, :, None]


def pretrain(args: argparse.Namespace) -> BeitForImageClassification:
    """Train on `args.images` freshly composed images; return the classifier of fractals, on the CPU.

    The texture head only serves training and is dropped.
    """
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    figures = draw_all_figures(args.figure_classes, args.figures_per_class, args.seed)
    textures = Textures(args.texture_classes, IMAGE_SIZE, args.seed)
    model = BeitForImageClassification(backbone_config(args.figure_classes))
    texture_head = nn.Linear(model.config.hidden_size, args.texture_classes)
    parameters = [*model.parameters(), *texture_head.parameters()]
    optimizer = torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ], lr=args.learning_rate, weight_decay=0.05)
    steps = args.images // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, max(1, steps), pct_start=0.05)
    running = torch.zeros(3)  # loss, figure accuracy, texture accuracy
    for step in (bar := tqdm(range(steps), desc="pretrain", unit="step", mininterval=30)):
        figure_labels = torch.randint(args.figure_classes, (args.batch_size,), generator=generator)
        texture_labels = torch.randint(args.texture_classes, (args.batch_size,), generator=generator)
        variants = torch.randint(args.figures_per_class, (args.batch_size,), generator=generator)
        kind = torch.randint(3, (args.batch_size,), generator=generator)  # ground alone, figure alone, both
        shown = torch.stack([kind != 0, kind != 1], dim=1)
        variety = min(1.0, max(0.0, step / steps - 0.03) / 0.4)  # from black and white to all colours over 40 % of the run
        grounds = textures.draw(texture_labels, generator)
        images = compose(figures[figure_labels, variants], grounds, shown, variety, generator)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.beit(images).pooler_output
            figure_logits, texture_logits = model.classifier(features), texture_head(features)
        answers = [(figure_logits, figure_labels, shown[:, 0]), (texture_logits, texture_labels, shown[:, 1])]
        loss = sum(F.cross_entropy(logits[seen].float(), labels[seen], label_smoothing=0.1) for logits, labels, seen in answers)
        if not torch.isfinite(loss):
            raise SystemExit(f"the loss is {loss.item()} at step {step}: lower --learning-rate")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        hits = [(logits.argmax(-1) == labels)[seen].float().mean() for logits, labels, seen in answers]
        running = running.lerp(torch.stack([loss.detach(), *hits]), max(0.02, 1 / (step + 1)))
        bar.set_postfix(loss=f"{running[0]:.3f}", figures=f"{running[1]:.3f}", textures=f"{running[2]:.3f}", refresh=False)
        if args.save_every and (step + 1) % args.save_every == 0:
            save(model, args.output)
    return model


def save(model: BeitForImageClassification, folder: Path) -> None:
    """Write the model and its image processor in the ordinary Hugging Face layout."""
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument(
        "--images", type=int, default=360_000, help="images to train on, each composed afresh; 0 writes the untrained network"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--learning-rate", type=float, default=1.2e-3, help="peak rate of AdamW")
    parser.add_argument("--figure-classes", type=int, default=100, help="iterated function systems")
    parser.add_argument("--figures-per-class", type=int, default=200, help="variants drawn of each system")
    parser.add_argument("--texture-classes", type=int, default=150, help="texture formulas")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between saved states, 0 for none")
    parser.add_argument("--seed", type=int, default=3407, help="seed of every random number")
    args = parser.parse_args()
    save(pretrain(args), args.output)


if __name__ == "__main__":
    main()
