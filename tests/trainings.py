"""Heads and tiny backbones to train, with the data to do it."""

import torch
from pipeline import IMAGE_SIZE
from torch import nn

from common.cli.flags import MixtureConfig
from common.data.tensors import ImageSet
from common.training.loop import fit

WIDTH, CLASSES = 6, 3

def settings(**changes):
    """Settings of a short training in fp32 on the CPU."""
    small = {"device": "cpu", "precision": "fp32", "epochs": 3, "batch_size": 8, "accumulation_steps": 1,
             "learning_rate": 0.05}
    return MixtureConfig(**{**small, **changes})


def examples(count, seed=0):
    """Features (N, 6) with labels that follow from them, but for some noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, WIDTH, generator=generator)
    noise = torch.randn(count, CLASSES, generator=generator)
    return ImageSet(inputs, (inputs[:, :CLASSES] + noise).argmax(1))


def pictures(count, seed=0):
    """Random images (N, 3, 32, 32) with random labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return ImageSet(images, labels, torch.full((3,), 2 / 255), torch.full((3,), -1.0))


def head(seed=0):
    """A fresh linear head."""
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, CLASSES)


def weights(model):
    """A copy of the parameters as one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def trained(config, train=None, validation=None, **how):
    """The weights of a fresh head after training, and the history."""
    model = head()
    history = fit(model, train or examples(21), validation or examples(16, seed=1), config, "test", **how).history
    return weights(model), history
