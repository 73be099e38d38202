"""Context Gated Mixture of LoRA Experts: one model that weighs frozen LoRA adapters by what it sees.

    from ContextGatedMOE import ContextGatedMOE
    model = ContextGatedMOE.from_adapters(base_model, {"fire": "fire_lora", "game": "game_lora"})

Open `model.py` first: it tells the forward pass in order.
"""

from typing import Any

from ContextGatedMOE.adapters import Expert
from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.forward import Prediction
from ContextGatedMOE.model import ContextGatedMOE

__all__ = ["ContextGatedMOE", "Expert", "MixtureError", "Prediction", "read_expert"]


def __getattr__(name: str) -> Any:
    """`read_expert` when it is asked for: peft, by which it reads, takes long to import, and a saved mixture needs none."""
    if name == "read_expert":
        from ContextGatedMOE.reading import read_expert

        return read_expert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
