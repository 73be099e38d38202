"""Context Gated Mixture of LoRA Experts: one model that weighs frozen LoRA adapters by what it sees.

    from ContextGatedMOE import ContextGatedMOE
    model = ContextGatedMOE.from_adapters(base_model, {"fire": "fire_lora", "game": "game_lora"})

Open `model.py` first: it tells the forward pass in order.
"""

from ContextGatedMOE.adapters import Expert
from ContextGatedMOE.errors import MixtureError
from ContextGatedMOE.forward import Prediction
from ContextGatedMOE.model import ContextGatedMOE
from ContextGatedMOE.reading import read_expert

__all__ = ["ContextGatedMOE", "Expert", "MixtureError", "Prediction", "read_expert"]
