"""What all drawn pictures share: colours, corners, smooth noise, and the camera they are seen through."""

import io
import math

import numpy as np
from PIL import Image, ImageFilter

Colour = tuple[int, int, int]
Corners = list[tuple[float, float]]


def mixed(first: Colour, second: Colour, share: float) -> Colour:
    """The colour that has this share of the second colour."""
    return tuple(round(a + share * (b - a)) for a, b in zip(first, second, strict=True))


def polygon(corners: int, middle: np.ndarray, radius: float, turn: float, depth: float = 1.0) -> Corners:
    """Corners of a regular polygon, or with `depth` under 1 of a star, whose inner corners lie at that share of the radius."""
    number = corners if depth == 1 else 2 * corners
    angles = turn + 2 * math.pi * np.arange(number) / number
    reach = radius * np.where(np.arange(number) % 2, depth, 1.0)
    return list(map(tuple, (middle + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)).tolist()))


def smooth_noise(size: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Periodic noise (size, size) of mean 0 and variance 1, whose amplitude falls as frequency^-exponent."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * frequency**-exponent, s=(size, size))
    return noise / noise.std()


def noisy(image: Image.Image, rng: np.random.Generator, most: float = 25) -> np.ndarray:
    """The image with pixel noise of a random strength, at most `most` of 255: (H, W, 3) uint8."""
    pixels = np.asarray(image, np.float32)
    return (pixels + rng.uniform(0, most) * rng.standard_normal(pixels.shape, np.float32)).clip(0, 255).astype(np.uint8)


def compressed(image: Image.Image, lowest: int, highest: int, rng: np.random.Generator) -> Image.Image:
    """The image after JPEG compression of a random quality from `lowest` to below `highest`."""
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=int(rng.integers(lowest, highest)))
    return Image.open(stored)


def photographed(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The image through a camera of unknown exposure, saturation and white balance, at times blurred or compressed."""
    pixels = np.asarray(image, np.float32) / 255
    grey = pixels.mean(2, keepdims=True)
    pixels = np.maximum(grey + rng.uniform(0.3, 1.1) * (pixels - grey), 0) * np.exp(rng.normal(0, 0.07, 3))
    pixels = pixels ** rng.uniform(0.7, 1.2) * rng.uniform(0.7, 1.25)
    image = Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))
    if rng.uniform() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    return noisy(compressed(image, 25, 80, rng) if rng.uniform() < 0.3 else image, rng, 8)
