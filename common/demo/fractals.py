"""Images made by formula alone: coloured fractals over procedural textures, for pretraining the demo backbone.

Two families of formulas give two labels to each image. The figure is the attractor of an iterated function
system (IFS), one system per class, as in Kataoka et al., "Pre-training without Natural Images" (ACCV 2020). The
ground is filtered noise, one filter and point-wise function per class. No photograph, scene or game is involved.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

FIGURE_SIZE = 72  # pixels; a little more than the 64 the model sees, so that a zoomed figure stays sharp
CHAINS = 512  # points of the chaos game that move together
BURN_IN, STEPS = 12, 24  # iterations dropped, iterations drawn


def sample_system(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a contractive IFS of 2 to 5 affine maps: matrices (N, 2, 2), offsets (N, 2).

    Maps are built from their singular values, so that every draw converges, and the singular values are scaled to
    a total that gives attractors that are neither dust nor a blob (Anderson and Farrell, "Improving Fractal
    Pre-training", WACV 2022).
    """
    count = int(rng.integers(2, 6))
    total = rng.uniform(0.5 * (5 + count), 0.5 * (6 + count))  # of s1 + 2 s2 over all maps
    while True:
        singular = np.sort(rng.uniform(0.1, 1.0, (count, 2)), axis=1)[:, ::-1]
        singular = singular * total / (singular @ np.array([1.0, 2.0])).sum()
        if singular.max() < 0.98:
            break
    left, right = (_rotations(rng.uniform(0, 2 * math.pi, count)) for _ in range(2))
    mirror = rng.choice([-1.0, 1.0], (count, 1, 2))
    return left @ (singular[:, :, None] * right) * mirror, rng.uniform(-1, 1, (count, 2))


def _rotations(angles: np.ndarray) -> np.ndarray:
    """Rotation matrices (N, 2, 2) for angles (N,) in radians."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def draw_figures(system: tuple[np.ndarray, np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` variants of one fractal: (count, FIGURE_SIZE, FIGURE_SIZE) uint8, brightness = log density.

    Each variant scales every coefficient of the system by a factor near one, the intra-class variation of FractalDB.
    """
    matrices, offsets = system
    maps = len(matrices)
    # A factor on a whole row or on both rows never exceeds one, so a variant stays contractive.
    matrices = (matrices * rng.uniform(0.88, 1.0, (count, maps, 2, 1))).astype(np.float32)
    offsets = (offsets * rng.uniform(0.85, 1.15, (count, maps, 2))).astype(np.float32)
    weights = np.abs(np.linalg.det(matrices)) + 0.02  # area covered by a map, and a floor for flat ones
    thresholds = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)[:, None, :-1]  # (count, 1, maps - 1)
    rows = np.arange(count)[:, None]
    points = np.zeros((count, CHAINS, 2), np.float32)
    drawn = []
    for step in range(BURN_IN + STEPS):
        choice = (rng.random((count, CHAINS, 1), np.float32) > thresholds).sum(-1)  # (count, CHAINS)
        points = (matrices[rows, choice] * points[:, :, None, :]).sum(-1) + offsets[rows, choice]
        if step >= BURN_IN:
            drawn.append(points)
    points = np.concatenate(drawn, axis=1)  # (count, STEPS * CHAINS, 2)
    low, high = np.quantile(points, [0.005, 0.995], axis=1, keepdims=True)
    pixels = ((points - low) / np.maximum(high - low, 1e-6) * (FIGURE_SIZE - 1)).round().astype(np.int64)
    inside = ((pixels >= 0) & (pixels < FIGURE_SIZE)).all(-1)
    flat = (rows * FIGURE_SIZE + pixels[..., 0]) * FIGURE_SIZE + pixels[..., 1]
    density = np.bincount(flat[inside], minlength=count * FIGURE_SIZE**2).reshape(count, FIGURE_SIZE, FIGURE_SIZE)
    brightness = np.log1p(density)
    return (255 * brightness / brightness.max((1, 2), keepdims=True)).astype(np.uint8)


class Textures:
    """Procedural grounds: noise shaped by one random spectrum per class, then by one point-wise function.

    A spectrum is a power law, a ring or two oriented bands, which gives clouds, grain, spots, stripes and weaves;
    the function (none, ridges, steps, waves) turns them into terrain-like, cellular, blocky or wood-like grounds.
    """

    def __init__(self, classes: int, size: int, seed: int):
        rng = np.random.default_rng([seed, 2])
        frequency = np.fft.fftfreq(size) * size
        fy, fx = np.meshgrid(frequency, frequency, indexing="ij")
        radius, angle = np.hypot(fx, fy), np.arctan2(fy, fx)
        self.size = size
        self.spectra = torch.tensor(
            np.stack([self._spectrum(rng, radius, angle) for _ in range(classes)]), dtype=torch.float32
        )
        self.shaping = torch.tensor(rng.integers(0, 4, classes))
        self.gain = torch.tensor(rng.uniform(1.0, 3.5, classes), dtype=torch.float32)

    @staticmethod
    def _spectrum(rng: np.random.Generator, radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
        kind = rng.integers(0, 3)
        if kind == 0:
            squeeze = 1 + rng.uniform(0, 3) * np.sin(angle - rng.uniform(0, math.pi)) ** 2
            spectrum = np.maximum(radius * squeeze, 1) ** -rng.uniform(0.5, 3.0)
        elif kind == 1:
            spectrum = np.exp(-(((radius - rng.uniform(3, 18)) / rng.uniform(0.8, 3)) ** 2))
        else:
            spectrum = np.zeros_like(radius)
            direction = rng.uniform(0, math.pi)
            for turn in (0, math.pi / 2)[: rng.integers(1, 3)]:
                along = radius * np.cos(angle - direction - turn)
                across = radius * np.sin(angle - direction - turn)
                pitch = rng.uniform(3, 14)
                spectrum += np.exp(-(((np.abs(along) - pitch) / 0.9) ** 2) - (across / rng.uniform(0.7, 3)) ** 2)
        return spectrum

    def draw(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw one ground for each label (B,): (B, size, size) float32 in [0, 1]."""
        noise = torch.randn(len(labels), self.size, self.size, generator=generator)
        field = torch.fft.ifft2(torch.fft.fft2(noise) * self.spectra[labels]).real
        field = (field - field.mean((1, 2), keepdim=True)) / field.std((1, 2), keepdim=True).clamp_min(1e-6)
        gain = self.gain[labels][:, None, None]
        shaped = torch.stack([
            field, field.abs() * 2 - 1.5, (field * gain).round() / gain, torch.sin(field * gain) * 1.5
        ])  # (4, B, size, size)
        return (shaped[self.shaping[labels], torch.arange(len(labels))] / 4 + 0.5).clamp(0, 1)


def compose(
    figures: torch.Tensor, grounds: torch.Tensor, shown: torch.Tensor, variety: float, generator: torch.Generator
) -> torch.Tensor:
    """Colour figures over grounds and vary the view: (B, 3, S, S) float32 in [-1, 1].

    figures: (B, 1, F, F) uint8; grounds: (B, S, S) float32; shown: (B, 2) bool, whether the figure and the ground are to be
    seen (an unseen ground is one colour). Each figure is turned, mirrored, zoomed and shifted; both layers run
    from a dark to a bright colour of random hues; then contrast, brightness and noise vary. variety: 0 for black and
    white figures and grounds, 1 for all of this; a transformer starts to learn from the former only.
    """
    batch, size = len(figures), grounds.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    turn, zoom = uniform(-0.5, 0.5) * variety, uniform(0.7, 1.4)
    mirror = (uniform(0, 1) < 0.5).float() * 2 - 1
    cos, sin = torch.cos(turn) * zoom, torch.sin(turn) * zoom
    shift = uniform(-0.3, 0.3, 2) * variety
    view = torch.stack([
        torch.stack([cos * mirror, -sin, shift[:, 0]], -1), torch.stack([sin * mirror, cos, shift[:, 1]], -1)
    ], 1)  # (B, 2, 3)
    grid = F.affine_grid(view, [batch, 1, size, size], align_corners=False)
    figure = F.grid_sample(figures.float() / 255, grid, align_corners=False)  # (B, 1, S, S)
    shown = shown.float()[:, :, None, None, None]  # (B, 2, 1, 1, 1)
    ground = grounds[:, None] * shown[:, 1] + uniform(0, 1, 1, 1, 1) * (1 - shown[:, 1])

    def ramp(values: torch.Tensor) -> torch.Tensor:
        dark, bright = uniform(0, 0.5, 3, 1, 1) * variety, 1 - uniform(0, 0.5, 3, 1, 1) * variety
        return torch.lerp(dark, bright, values)

    opacity = (figure * uniform(2, 6, 1, 1, 1)).clamp(0, 1) * shown[:, 0]
    dimming = 1 - uniform(0, 0.6, 1, 1, 1) * variety
    image = ramp(ground) * dimming * (1 - opacity) + ramp(0.4 + 0.6 * figure) * opacity
    contrast, brightness = uniform(-0.3, 0.3, 1, 1, 1) * variety, uniform(-0.15, 0.15, 1, 1, 1) * variety
    image = (image - 0.5) * (1 + contrast) + 0.5 + brightness
    image = image + torch.randn(image.shape, generator=generator) * uniform(0, 0.04, 1, 1, 1)
    return image.clamp(0, 1) * 2 - 1
