"""Tiny random image classifiers of several families, with their image processors, in the Hugging Face layout."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from pipeline import IMAGE_SIZE
from transformers import PreTrainedModel

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": IMAGE_SIZE,
         "patch_size": 8, "initializer_range": 0.06}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
CROPPED = {"size": {"shortest_edge": 40}, "crop_size": SIZE}
Family = tuple[str, Callable[[], transformers.PreTrainedConfig], str, dict]
FAMILIES: dict[str, Family] = {  # class, configuration, image processor, its settings
    "beit": ("BeitForImageClassification", lambda: transformers.BeitConfig(**SHAPE, use_relative_position_bias=True),
             "BeitImageProcessorPil", {"size": SIZE, "do_center_crop": False}),
    "vit": ("ViTForImageClassification", lambda: transformers.ViTConfig(**SHAPE), "ViTImageProcessorPil", {"size": SIZE}),
    "deit": ("DeiTForImageClassificationWithTeacher", lambda: transformers.DeiTConfig(**SHAPE), "DeiTImageProcessorPil",
             {"size": {"height": 36, "width": 36}, "crop_size": SIZE}),
    "dinov2": ("Dinov2ForImageClassification", lambda: transformers.Dinov2Config(**SHAPE), "BitImageProcessorPil", CROPPED),
    "swin": ("SwinForImageClassification", lambda: transformers.SwinConfig(
        image_size=IMAGE_SIZE, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4,
        initializer_range=0.06), "ViTImageProcessorPil", {"size": SIZE}),
    "siglip": ("SiglipModel", lambda: transformers.SiglipConfig(vision_config=SHAPE, text_config=TEXT),
               "SiglipImageProcessorPil", {"size": SIZE}),
    "clip": ("CLIPModel", lambda: transformers.CLIPConfig(vision_config=SHAPE, text_config=TEXT),
             "CLIPImageProcessorPil", {**CROPPED, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}),
}


def save_family(name: str, folder: Path, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Write a random model of a family, as it is published: DeiT with two heads, SigLIP and CLIP with a text model.

    changes: of its configuration.
    """
    architecture, make_config, processor, settings = FAMILIES[name]
    torch.manual_seed(seed)
    config = make_config()
    config.update(changes)
    model = getattr(transformers, architecture)(config)
    model.save_pretrained(folder)
    getattr(transformers, processor)(**settings).save_pretrained(folder)
    return model
