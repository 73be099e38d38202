"""Backbones, heads and LoRA: build, load and save in the Hugging Face layouts. Scripts, comparison and results use it.

What needs peft is in `common.models.lora`, so that whoever only loads a finished model does not wait for it.
"""

from common.models.backbones import backbone_fingerprint, load_backbone, load_processor, trainable_parameters
from common.models.stored import (
    base_folder,
    check_expert,
    check_model,
    fingerprint,
    load_base,
    lora_folder,
    mixture_folder,
    mixture_name,
    save,
)

__all__ = [
    "backbone_fingerprint", "base_folder", "check_expert", "check_model", "fingerprint", "load_backbone", "load_base",
    "load_processor", "lora_folder", "mixture_folder", "mixture_name", "save", "trainable_parameters",
]
