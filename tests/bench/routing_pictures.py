"""How the pictures of the routing suite are drawn: glyphs, shapes, plots, counted things, edited photographs, textures.

Every function draws one class and returns RGB pictures as (H, W, 3) uint8 arrays. All randomness comes from `rng`.
"""

import math
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import cbook
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits, load_sample_image

from common.demo.drawing import Colour, compressed, noisy, polygon
from common.demo.fractals import Textures, compose, draw_figures, sample_system

SIZE = 64  # pixels, square, of what is drawn here; plots and the demo's pictures are larger
SERIF = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
         "STIXGeneralBolIta", "cmr10", "cmb10")
SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "cmss10", "cmtt10")


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def two_colours(rng: np.random.Generator, contrast: int = 70) -> tuple[Colour, Colour]:
    """A ground and an ink whose brightness differs by at least `contrast` of 255; either may be the darker."""
    while True:
        ground, ink = rng.integers(0, 256, (2, 3))
        if abs(int(ground.mean()) - int(ink.mean())) >= contrast:
            return tuple(ground.tolist()), tuple(ink.tolist())


def glyph(character: str, rng: np.random.Generator, fonts: tuple[str, ...] = SERIF + SANS) -> np.ndarray:
    """A character in any colours, turned by up to 8 degrees, large, near the middle, with up to two lines through it."""
    ground, ink = two_colours(rng, 80)
    mask = Image.new("L", (SIZE, SIZE))
    middle = (SIZE / 2 + rng.uniform(-3, 3), SIZE / 2 + rng.uniform(-3, 3))
    ImageDraw.Draw(mask).text(middle, character, 255, _font(str(rng.choice(fonts)), int(rng.integers(48, 60))), anchor="mm")
    mask = mask.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    image = Image.new("RGB", (SIZE, SIZE), ground)
    image.paste(ink, mask=mask)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 3)):
        draw.line(rng.integers(0, SIZE, 4).tolist(), tuple(rng.integers(0, 256, 3).tolist()), int(rng.integers(1, 3)))
    return noisy(image, rng, 10)


_digits = cache(load_digits)


def scans(digit: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Different scans (8, 8) of a handwritten digit, as ink on paper; at most about 170 of each digit."""
    drawn = rng.choice(np.flatnonzero(_digits().target == digit), count, replace=False)
    images = []
    for strength in _digits().images[drawn] / 16:
        paper, ink = rng.uniform(190, 255) - rng.uniform(0, 25, 3), rng.uniform(0, 110, 3)
        images.append(noisy(Image.fromarray((paper + strength[..., None] * (ink - paper)).astype(np.uint8)), rng, 10))
    return images


CORNERS = {  # of each shape, and the depth of a star's inner corners
    "circle": (24, 1.0), "cross": (4, 0.42), "hexagon": (6, 1.0), "pentagon": (5, 1.0), "square": (4, 1.0), "star": (5, 0.5),
}


def shape(name: str, rng: np.random.Generator) -> np.ndarray:
    """A shape of CORNERS, filled or in outline, turned at will, over smaller scraps of colour."""
    ground, ink = two_colours(rng, 60)
    image = Image.new("RGB", (SIZE, SIZE), ground)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):
        scrap = polygon(int(rng.integers(3, 6)), rng.uniform(0, SIZE, 2), rng.uniform(3, 9), rng.uniform(0, 6))
        draw.polygon(scrap, tuple(rng.integers(0, 256, 3).tolist()))
    corners, depth = CORNERS[name]
    outline = polygon(corners, rng.uniform(27, SIZE - 27, 2), rng.uniform(16, 26), rng.uniform(-0.3, 0.3) - math.pi / 2, depth)
    draw.polygon(outline, ink if rng.uniform() < 0.6 else None, ink, int(rng.integers(2, 4)))
    return noisy(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1))), rng)


def plot(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A chart of matplotlib, (128, 128, 3), in any colours, with or without axes and grid."""
    figure = Figure((2, 2), dpi=SIZE)
    canvas = FigureCanvasAgg(figure)
    paper, ink = (np.divide(colour, 255) for colour in two_colours(rng))
    figure.set_facecolor(paper)
    axes = figure.add_axes((0.12, 0.12, 0.8, 0.8), facecolor=paper)
    number = int(rng.integers(4, 12))
    at, values = np.arange(number), np.abs(np.cumsum(rng.standard_normal(number))) + 0.2
    if kind == "area":
        axes.fill_between(at, values, color=ink, step="mid" if rng.uniform() < 0.3 else None)
    elif kind == "bar":
        axes.bar(at, values, rng.uniform(0.5, 1.0), color=ink)
    elif kind == "box":
        axes.boxplot(list(rng.standard_normal((number, 12)) + values[:, None]), patch_artist=True, boxprops={"facecolor": ink})
    elif kind == "line":
        axes.plot(at, values, color=ink, linewidth=rng.uniform(1, 3), marker="o" if rng.uniform() < 0.4 else None)
    elif kind == "pie":
        axes.pie(values, colors=rng.uniform(0, 1, (number, 3)), startangle=rng.uniform(0, 360))
    elif kind == "scatter":
        axes.scatter(rng.uniform(0, number, 3 * number), rng.uniform(0, 3, 3 * number), rng.uniform(5, 40), color=ink)
    else:
        axes.stem(at, values, linefmt="grey", basefmt=" ").markerline.set_color(ink)
    if rng.uniform() < 0.5:
        axes.set_axis_off()
    axes.grid(rng.uniform() < 0.3)
    canvas.draw()
    return noisy(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()), rng, 45)


def counted(name: str, rng: np.random.Generator) -> np.ndarray:
    """Few (2 to 4) or many (6 to 9) things apart from each other, in one of four looks that have little in common."""
    number = int(rng.integers(2, 5) if name == "few" else rng.integers(6, 10))
    cells = rng.permutation(9)[:number]
    middles = np.stack([cells % 3, cells // 3], 1) * 21 + 11 + rng.uniform(-3, 3, (number, 2))
    radii, look = rng.uniform(3, 8, number), rng.integers(4)
    ground, ink = two_colours(rng)
    if look == 0:  # letters on paper
        image, thing = Image.new("RGB", (SIZE, SIZE), (240, 235, 220)), str(rng.choice(list("#&8BQ@")))
        for middle, radius in zip(middles, radii, strict=True):
            ImageDraw.Draw(image).text(tuple(middle), thing, (40, 30, 60), _font("STIXGeneral", int(12 + radius)), anchor="mm")
    elif look == 1:  # bright spots in the dark, blurred
        image = Image.new("RGB", (SIZE, SIZE), (8, 8, 20))
        for middle, radius in zip(middles, radii, strict=True):
            ImageDraw.Draw(image).polygon(polygon(24, middle, radius, 0), (255, 230, 170))
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1, 3)))
    elif look == 2:  # coloured triangles on a striped ground
        stripes = np.indices((SIZE, SIZE)).max(0)[..., None] // 4 % 2
        image = Image.fromarray(np.where(stripes, ground, np.add(ground, 255) // 2).astype(np.uint8))
        for middle, radius in zip(middles, radii, strict=True):
            ImageDraw.Draw(image).polygon(polygon(3, middle, radius + 1, rng.uniform(0, 6)), ink)
    else:  # frames on coarse noise
        image = Image.fromarray(rng.integers(90, 200, (8, 8, 3), dtype=np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for middle, radius in zip(middles, radii, strict=True):
            ImageDraw.Draw(image).polygon(polygon(4, middle, radius + 1, 0.785), None, (20, 20, 20), 2)
    return noisy(image, rng)


@cache
def _photographs() -> tuple[Image.Image, ...]:
    """The photographs that come with scikit-learn and matplotlib."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = Image.open(file).convert("RGB")
    return (*(Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")), portrait)


def edited(name: str, rng: np.random.Generator) -> np.ndarray:
    """A piece of a photograph, grey, tinted or as it is, that was blurred, compressed, sharpened, made noisy or left alone."""
    photograph = _photographs()[rng.integers(3)]
    side = int(rng.integers(SIZE, 3 * SIZE))
    left, top = rng.integers(0, photograph.width - side), rng.integers(0, photograph.height - side)
    image = photograph.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    look = rng.integers(3)
    if look:
        tint = rng.uniform(0.5, 1.0, 3) if look == 2 else np.ones(3)
        image = Image.fromarray((np.asarray(image.convert("L"))[..., None] * tint).astype(np.uint8))
    if name == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 2.0)))
    elif name == "compressed":
        image = compressed(image, 4, 15, rng)
    elif name == "noisy":
        pixels = np.asarray(image, np.float32)
        image = Image.fromarray((pixels + rng.uniform(8, 25) * rng.standard_normal(pixels.shape)).clip(0, 255).astype(np.uint8))
    elif name == "sharpened":
        image = image.filter(ImageFilter.UnsharpMask(1.5, int(rng.integers(100, 250)), 0))
    return np.asarray(image)


def textures(family: int, classes: int, label: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Grounds of the demo's formulas in any colours, each mixed with another class's of the same family, behind a fractal."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    formulas = Textures(classes, SIZE, family)
    others = (label + torch.randint(1, classes, (count,), generator=generator)) % classes
    share = 0.5 + 0.25 * torch.rand(count, 1, 1, generator=generator)
    grounds = formulas.draw(torch.full((count,), label), generator) * share + formulas.draw(others, generator) * (1 - share)
    figures = torch.from_numpy(np.concatenate([draw_figures(sample_system(rng), 1, rng) for _ in range(count)]))[:, None]
    images = compose(figures, grounds, torch.ones(count, 2, dtype=torch.bool), 1.0, generator)
    return list(((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
