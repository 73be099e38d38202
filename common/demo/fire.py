"""Aerial images of places whose risk of fire follows from a small physical model.

The risk keeps the three factors of Rothermel's rate of spread (USDA Forest Service INT-115, 1972) that an aerial image can
show: fuel load, moisture damping and slope. Water, bare, farmed and built-up ground carries no wildland fuel (models NB1 to
NB9 of Scott and Burgan, RMRS-GTR-153, 2005). The class names are four of the seven of FireRisk (Shen et al., 2023).
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from common.demo.drawing import Colour, Corners, mixed, photographed, smooth_noise

CLASS_NAMES = ("high", "low", "moderate", "non-burnable")
SIZE = 128  # pixels, square

# No place lies between two bands, as no picture could tell on which side of a bound it falls. The wider the gaps, the easier.
RISK_BAND = {"high": (3.8, np.inf), "low": (0.0, 0.2), "moderate": (0.85, 1.05), "non-burnable": (0.0, np.inf)}  # kg/m2 of fuel
WILD = {"high": (0.7, 1.0), "low": (0.7, 1.0), "moderate": (0.7, 1.0), "non-burnable": (0.0, 0.05)}  # share of the area
# Anderson (INT-122, 1982), total load under 3 inches of fuel models 1, 6 and 10; kg/m2 (1 ton/acre = 0.2242).
GRASS_LOAD, SHRUB_LOAD, TREE_LOAD = 0.74 * 0.2242, 6.0 * 0.2242, 12.0 * 0.2242
PACKING_RATIO = 0.017  # of fuel model 10

# Of each cover the colour when moist or dark, and when dry or light.
COVERS = {
    "water": ((40, 62, 74), (98, 98, 80)), "bare": ((140, 121, 102), (170, 162, 146)), "crop": ((84, 106, 62), (148, 135, 109)),
    "yard": ((88, 106, 68), (130, 121, 95)), "paved": ((104, 104, 104), (148, 141, 131)), "roof": ((122, 113, 109), (196, 190, 186)),
    "grass": ((93, 110, 68), (157, 143, 113)), "shrub": ((74, 88, 62), (121, 111, 90)), "tree": ((56, 76, 48), (97, 93, 70)),
}


@dataclass(frozen=True)
class Site:
    """What kind of place it is. moisture: over that at which fire goes out; slope: root mean square, rise over run; trees: share
    of the wild ground; shrubs: share of the ground not under trees; the rest: shares of the area."""

    moisture: float
    slope: float
    trees: float
    shrubs: float
    water: float
    bare: float
    farm: float
    built: float


def risk(moisture: np.ndarray, slope: np.ndarray, trees: np.ndarray, shrubs: np.ndarray) -> np.ndarray:
    """Fuel load x moisture damping (Rothermel's eta_M) x slope factor (his 1 + phi_s, without wind) of sites, kg/m2."""
    load = trees * TREE_LOAD + (1 - trees) * (shrubs * SHRUB_LOAD + (1 - shrubs) * GRASS_LOAD)
    damping = 1 + moisture * (-2.59 + moisture * (5.11 - 3.52 * moisture))
    return load * damping * (1 + 5.275 * PACKING_RATIO**-0.3 * slope**2)


def draw_site(name: str, rng: np.random.Generator) -> Site:
    """A site of the class."""
    low, high = RISK_BAND[name]
    sites = rng.uniform((0.2, 0.03, 0, 0), (0.92, 0.36, 1, 1), (5000, 4))  # so many that every band has some
    fitting = (low <= (risks := risk(*sites.T))) & (risks <= high)
    # Weights under 1 let one kind of ground prevail, as it does in real tiles; much bare ground would look like grass.
    tame = (1 - rng.uniform(*WILD[name])) * rng.dirichlet((0.4, 0.15, 0.8, 0.8))
    return Site(*sites[fitting.argmax()].tolist(), *tame.tolist())


def render(label: int, rng: np.random.Generator) -> np.ndarray:
    """One aerial image, (SIZE, SIZE, 3) uint8, of a place of the class CLASS_NAMES[label]."""
    site = draw_site(CLASS_NAMES[label], rng)
    paints = {cover: np.multiply(ends, np.exp(rng.normal(0, 0.04, (2, 3)) + rng.normal(0, 0.12, (2, 1))))
              for cover, ends in COVERS.items()}
    height, texture, patches = (smooth_noise(SIZE, exponent, rng) for exponent in (2.1, 0.9, 1.6))
    sun = rng.uniform(-1.2, 1.2), rng.uniform(0.5, 1.2)  # azimuth from the south, tangent of the elevation
    dryness = 0.5 + 0.9 * (0.56 - site.moisture) + rng.normal(0, 0.1)
    ground = blended(paints["grass"], dryness + 0.2 * texture).clip(0, 255).astype(np.uint8)
    image, tamed = Image.fromarray(ground), Image.new("1", (SIZE, SIZE))
    draw_parcels(ImageDraw.Draw(image), ImageDraw.Draw(tamed), site, paints, sun, rng)
    if rng.uniform() < 0.5:
        road = wandering_line(rng)
        ImageDraw.Draw(image).line(road, flat(paints["paved"], rng.uniform()), int(rng.integers(2, 5)), "curve")
        ImageDraw.Draw(tamed).line(road, 1, 6)
    ground, wet, rocky = np.array(image), height < np.quantile(height, site.water), patches > np.quantile(patches, 1 - site.bare)
    ground[rocky] = blended(paints["bare"], 0.5 + 0.5 * texture)[rocky].clip(0, 255)
    ground[wet] = flat(paints["water"], rng.uniform(0, 0.5))
    image, tame = Image.fromarray(ground), np.asarray(tamed) | wet | rocky
    draw_plants(ImageDraw.Draw(image), tame, site, paints, dryness, sun, patches, rng)
    south, east = np.gradient(height)
    steep = site.slope / math.sqrt(np.mean(south**2 + east**2))
    steep = np.where(tame, 0.3, 1) * steep  # fields and houses are on gentle ground
    light = 1 - steep * (south * math.cos(sun[0]) + east * math.sin(sun[0])) / sun[1]
    shaded = np.asarray(image) * light.clip(0.3, 1.8)[..., None]
    shaded *= rng.uniform(65, 115) / shaded.mean()  # exposed, so that brightness does not give the class away
    return photographed(Image.fromarray(shaded.clip(0, 255).astype(np.uint8)), rng)


def blended(paint: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """Between the two colours of a paint (2, 3), by `mix` (...) in 0..1: (..., 3)."""
    return paint[0] + np.clip(mix, 0, 1)[..., None] * (paint[1] - paint[0])


def flat(paint: np.ndarray, mix: float, tone: float = 1.0) -> Colour:
    """One colour between the two of a paint."""
    return tuple((blended(paint, np.float64(mix)) * tone).clip(0, 255).astype(int).tolist())


def wandering_line(rng: np.random.Generator) -> Corners:
    """Points of a line that bends across the whole image."""
    turn, along = rng.uniform(0, math.pi), np.arange(-SIZE, SIZE + 1, 4)
    across = rng.uniform(-0.3, 0.3) * SIZE
    for _ in range(2):
        across = across + rng.uniform(2, 10) * np.sin(along / rng.uniform(12, 40) + rng.uniform(0, 6))
    return turned(np.stack([along, across], 1), turn)


def turned(points: np.ndarray, turn: float) -> Corners:
    """Points (N, 2), from the middle of the image, turned round it."""
    axes = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return list(map(tuple, (points @ axes + SIZE / 2).tolist()))


def draw_parcels(draw: ImageDraw.ImageDraw, taming: ImageDraw.ImageDraw, site: Site, paints: dict[str, np.ndarray],
                 sun: tuple[float, float], rng: np.random.Generator) -> None:
    """Fields with rows, and yards with houses, on a turned grid; `taming` marks the ground that they take."""
    turn, side, zone = rng.uniform(0, math.pi), rng.uniform(26, 44), smooth_noise(SIZE, 1.5, rng)
    land = 1 - site.water - site.bare
    farmed, built = np.quantile(zone, (site.farm / land, 1 - site.built / land))
    shadow = -np.array([math.sin(turn + sun[0]), math.cos(turn + sun[0])])

    def block(middle: np.ndarray, half: np.ndarray) -> Corners:
        return turned(middle + np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half, turn)

    for cell in np.stack(np.mgrid[-4:5, -4:5], -1).reshape(-1, 2):
        middle = cell * side
        x, y = np.array(turned(middle[None], turn)[0]).astype(int) % SIZE
        farm = zone[y, x] <= farmed
        if farmed < zone[y, x] < built:
            continue
        taming.polygon(block(middle, np.full(2, side / 2)), 1)
        draw.polygon(block(middle, np.full(2, side / 2)), flat(paints["paved"], rng.uniform(0, 0.6)))
        crop, half = flat(paints["crop" if farm else "yard"], rng.uniform()), side / 2 - rng.uniform(0.5, 2.5)
        draw.polygon(block(middle, np.full(2, half)), crop)
        if farm:
            for row in np.arange(-half + 1, half, rng.uniform(3, 6)):
                draw.line(turned(middle + np.array([[row, -half], [row, half]]), turn), mixed(crop, (40, 40, 30), 0.45))
            continue
        lots = int(rng.integers(1, 4))
        for lot in np.stack(np.mgrid[:lots, :lots], -1).reshape(-1, 2):
            place, roof = middle + (lot - (lots - 1) / 2) * 2 * half / lots, half / lots * rng.uniform(0.45, 0.8, 2)
            colour = flat(paints["roof"], rng.uniform())
            draw.polygon(block(place + shadow * 2 / sun[1], roof), (25, 27, 32))
            draw.polygon(block(place, roof), colour)
            draw.polygon(block(place + (0, roof[1] / 2), roof * (1, 0.5)), mixed(colour, (0, 0, 0), 0.2))


def draw_plants(draw: ImageDraw.ImageDraw, tame: np.ndarray, site: Site, paints: dict[str, np.ndarray], dryness: float,
                sun: tuple[float, float], patches: np.ndarray, rng: np.random.Generator) -> None:
    """Shrubs and then trees on a jittered grid, in clumps, each with its shadow; few on ground that is not wild."""
    for cover, share, pitch, tall in (("shrub", site.shrubs, rng.uniform(2.5, 4), 0.3), ("tree", site.trees, rng.uniform(5, 10), 0.6)):
        at = np.stack(np.mgrid[0:SIZE + pitch:pitch, 0:SIZE + pitch:pitch], -1).reshape(-1, 2)
        at = at + rng.uniform(-0.4, 0.4, at.shape) * pitch
        y, x = at.clip(0, SIZE - 1).astype(int).T
        chance = share + 1.2 * share * (1 - share) * patches[y, x]
        chance[tame[y, x]] *= 0.02
        at = at[rng.uniform(size=len(at)) < chance]
        mix, tone, radius = rng.uniform((-0.25, 0.75, 0.36), (0.25, 1.2, 0.72), (len(at), 3)).T[..., None]
        radius, colours = pitch * radius, blended(paints[cover], dryness + mix[:, 0]) * tone
        away = np.array([-math.sin(sun[0]), -math.cos(sun[0])]) * tall * radius / sun[1]
        layers = [(1, 1, np.full_like(colours, 24)), (0, 1, 0.75 * colours), (-0.35, 0.65, colours)]  # shadow, crown, lit part
        boxes = [np.hstack([at[:, ::-1] + shift * away - size * radius, at[:, ::-1] + shift * away + size * radius])
                 for shift, size, _ in layers]
        inks = [inks.clip(0, 255).astype(int) for *_, inks in layers]
        for box, ink in zip(np.stack(boxes, 1).reshape(-1, 4).tolist(), np.stack(inks, 1).reshape(-1, 3).tolist(), strict=True):
            draw.ellipse(box, tuple(ink))
