"""Aerial scenes of a small physical model of fire risk, rendered as RGB images.

A scene is a terrain with water, plants, fields, houses and roads on it. Its risk keeps the three factors of
Rothermel's rate of spread (USDA Forest Service INT-115, 1972) that an aerial photograph can show: fuel load,
moisture damping and slope. Ground that carries no wildland fuel (water, bare, farmed, built-up) follows the
non-burnable models NB1-NB9 of Scott and Burgan (RMRS-GTR-153, 2005). The class names are four of the seven
that the FireRisk data set (Shen et al., 2023) takes from the USDA Wildfire Hazard Potential map.
"""

import math
from dataclasses import dataclass

import numpy as np

CLASS_NAMES = ("high", "low", "moderate", "non-burnable")
NON_BURNABLE = CLASS_NAMES.index("non-burnable")
SIZE = 128  # pixels, square

# The bounds of the classes. Scenes between two bands are never rendered: no picture could tell on which side
# of a bound they fall. Wider gaps make the classes easier, narrower ones harder.
RISK_BAND = {"low": (0.0, 0.15), "moderate": (0.75, 0.90), "high": (3.4, np.inf)}  # kg/m2 of effective fuel
MAX_NON_BURNABLE, MIN_BURNABLE = 0.15, 0.75  # burnable share of the pixels: of "non-burnable", of the others

# Cover codes; each has two end colours (rows below) and a pixel mixes them by its `mix` in 0..1.
WATER, BARE, CROP, YARD, PAVED, ROOF, GRASS, SHRUB, TREE = range(9)
END_COLOURS = np.array([  # linear reflectance, red green blue: mix 0, mix 1
    [[.03, .06, .08], [.13, .13, .09]],  # water: deep, turbid
    [[.26, .20, .14], [.40, .36, .29]],  # bare: soil, rock or sand
    [[.09, .15, .05], [.30, .25, .16]],  # crop: grown, fallow
    [[.10, .15, .06], [.22, .19, .12]],  # yard: lawn, dry lawn
    [[.14, .14, .14], [.30, .27, .23]],  # paved: asphalt, gravel
    [[.20, .17, .16], [.55, .52, .50]],  # roof: dark, light
    [[.11, .16, .06], [.34, .28, .17]],  # grass: green, cured
    [[.07, .10, .05], [.19, .16, .10]],  # shrub: green, dry
    [[.04, .075, .03], [.12, .11, .06]],  # tree: green, dry
], np.float32)

# Anderson (INT-122, 1982), total load under 3 inches of fuel models 1, 6 and 10; kg/m2 (1 ton/acre = 0.2242).
LOAD = np.float32([0, 0, 0, 0, 0, 0, 0.74 * 0.2242, 6.0 * 0.2242, 12.0 * 0.2242])  # by cover
PACKING_RATIO = 0.017  # of fuel model 10, the fuel that decides between moderate and high
PLANT_CHANCE = np.float32([0, 0.06, 0, 0.25, 0, 0, 1, 0, 0])  # by cover: how freely plants stand on it

# Appearance is varied so much that neither brightness nor hue gives the class away: from 600 training images
# logistic regression on colour histograms learns about half of the test labels, a small CNN three quarters.
HUE_SPREAD, SHADE_SPREAD = 0.06, 0.25  # log sd of an end colour's channels, each and together: species, soils
WHITE_BALANCE_SPREAD = 0.10  # log sd of a channel's gain
EXPOSURE = (0.24, 0.45)  # mean of the image after exposure
GAMMA = (0.55, 0.95)
SATURATION = (0.35, 1.15)
SENSOR_NOISE = (0.004, 0.02)  # sd on the 0..1 scale
SEASON_SPREAD = 0.10  # sd of plants' colour about the one that their moisture implies

Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float32)
FY, FX = np.float32(np.fft.fftfreq(SIZE))[:, None], np.float32(np.fft.rfftfreq(SIZE))[None]  # cycles a pixel
SHADOW_STEPS = (1, 2, 3, 4, 6, 8)  # pixels; a longer shadow than 8 pixels is rare at these scales


@dataclass(frozen=True)
class Site:
    """What is drawn before any field: a few numbers that set what kind of place it is."""

    scale: float  # metres per pixel
    relief: float  # root mean square of the terrain's slope, rise over run
    moisture: float  # fuel moisture over the moisture at which fire goes out, 0..1
    tree_cover: float
    shrub_cover: float  # of the ground not under trees
    water: float  # shares of the area
    bare: float
    farm: float
    built: float

    def expected_risk(self) -> float:
        """The score the scene will have, but for the chance of where things fall."""
        under = self.shrub_cover * LOAD[SHRUB] + (1 - self.shrub_cover) * LOAD[GRASS]
        load = self.tree_cover * LOAD[TREE] + (1 - self.tree_cover) * under
        return float(load * moisture_damping(self.moisture) * slope_factor(self.relief))


@dataclass(frozen=True)
class Scene:
    """The fields of one place, each (SIZE, SIZE); the risk and the picture both come from them."""

    scale: float  # metres per pixel
    load: np.ndarray  # fuel, kg/m2; 0 where nothing burns
    moisture: np.ndarray  # as Site.moisture
    slope: np.ndarray  # of the ground, rise over run
    surface: np.ndarray  # height of ground, crowns and roofs, metres
    cover: np.ndarray  # codes
    mix: np.ndarray  # between the cover's end colours, 0..1
    tone: np.ndarray  # relative brightness about 1

    def burnable_share(self) -> float:
        """Share of the pixels that carry fuel."""
        return float(np.mean(self.load > 0))

    def risk(self) -> float:
        """Mean over the burnable pixels of load x moisture damping x slope factor, kg/m2."""
        score = self.load * moisture_damping(self.moisture) * slope_factor(self.slope)
        return float(score.sum() / max(np.count_nonzero(self.load), 1))

    def label(self) -> int | None:
        """The class, or None in a gap between two classes."""
        if self.burnable_share() <= MAX_NON_BURNABLE:
            return NON_BURNABLE
        return band_of(self.risk()) if self.burnable_share() >= MIN_BURNABLE else None


def moisture_damping(ratio: float | np.ndarray) -> float | np.ndarray:
    """Rothermel's eta_M for a ratio of moisture to moisture of extinction, 0..1."""
    return 1 + ratio * (-2.59 + ratio * (5.11 - 3.52 * ratio))


def slope_factor(slope: float | np.ndarray) -> float | np.ndarray:
    """Rothermel's 1 + phi_s for a slope as rise over run, without wind."""
    return 1 + 5.275 * PACKING_RATIO**-0.3 * slope**2


def band_of(risk: float) -> int | None:
    """The class of a burnable scene with this score, or None in a gap."""
    inside = [CLASS_NAMES.index(name) for name, (low, high) in RISK_BAND.items() if low <= risk <= high]
    return inside[0] if inside else None


def draw_site(label: int, rng: np.random.Generator) -> Site:
    """A site likely to give a scene of the class; drawing numbers first makes it cheap to reject."""
    while True:
        wild = rng.uniform(0.0, 0.22) if label == NON_BURNABLE else rng.uniform(0.6, 1.0)
        # Weights under 1 let one kind of ground prevail, as it does in real tiles.
        water, bare, farm, built = (1 - wild) * rng.dirichlet((0.3, 0.4, 0.4, 0.4))
        site = Site(rng.uniform(0.8, 1.8), rng.uniform(0.03, 0.36), rng.uniform(0.2, 0.92),
                    rng.uniform(), rng.uniform(), water, bare, farm, built)
        if label in (NON_BURNABLE, band_of(site.expected_risk())):
            return site


def spectral_noise(rng: np.random.Generator, exponent: float, squared=FY**2 + FX**2) -> np.ndarray:
    """Periodic noise of unit variance; amplitude ~ frequency^-exponent, of which `squared` is the square."""
    white = rng.standard_normal((*squared.shape, 2), np.float32).view(np.complex64)[..., 0]
    white[0, 0] = 0  # no mean
    squared = np.maximum(squared, np.float32(0.1 / SIZE**2))  # under any frequency but 0, which has no power
    noise = np.fft.irfft2(white * squared ** (-exponent / 2), s=(SIZE, SIZE))
    return noise / noise.std()


def wandering_line(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Signed distance, metres, to a line that bends across the whole tile: a river or a road."""
    u, v = rotated(rng.uniform(0, math.pi), scale)
    course = rng.uniform(-0.3, 0.3) * SIZE * scale
    for _ in range(2):
        length = rng.uniform(0.6, 1.6) * SIZE * scale
        phase = rng.uniform(0, 2 * math.pi)
        course += rng.uniform(0.02, 0.12) * length * np.sin(v * (2 * math.pi / length) + phase)
    return u - course


def rotated(angle: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in metres from the middle of the tile along axes turned by `angle`."""
    x, y = (X - SIZE / 2) * scale, (Y - SIZE / 2) * scale
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def make_terrain(site: Site, rng: np.random.Generator) -> np.ndarray:
    """Height of the ground, metres: folded noise for ridges and gullies, and a valley for a river."""
    angle, stretch = rng.uniform(0, math.pi), rng.uniform(1.0, 1.7)
    along, across = FX * math.cos(angle) + FY * math.sin(angle), FY * math.cos(angle) - FX * math.sin(angle)
    noise = spectral_noise(rng, rng.uniform(1.9, 2.5), (along * stretch) ** 2 + (across / stretch) ** 2)
    height = noise + rng.uniform(0, 2.5) * np.abs(noise)
    if rng.uniform() < 0.6:
        width = rng.uniform(20, 60)
        height = height - rng.uniform(1, 5) * np.exp(-(wandering_line(rng, site.scale) / width) ** 2)
    south, east = np.gradient(height, site.scale)
    return height * (site.relief / math.sqrt(np.mean(south**2 + east**2)))


def scatter_plants(rng: np.random.Generator, chance: np.ndarray, spacing: float) -> tuple:
    """Crowns on a jittered grid: fields of height in 0..0.8 (0 between them) and of a random 0..1 per crown.

    `chance` is the field of the probability that a plant stands; `spacing` is in pixels. A pixel looks only
    at the four nearest cells, so a crown's radius must stay under about 0.8 of a cell.
    """
    cells = int(SIZE / spacing) + 3
    jitter_y, jitter_x, size, identity, luck = rng.random((5, cells, cells), np.float32)
    corner = (np.arange(cells, dtype=np.float32) - 1) * spacing
    y, x = corner[:, None] + (0.1 + 0.8 * jitter_y) * spacing, corner + (0.1 + 0.8 * jitter_x) * spacing
    at = np.clip((y, x), 0, SIZE - 1).astype(int)
    size = 0.36 + 0.44 * size  # radius over spacing, and height
    narrowness = np.where(luck < chance[at[0], at[1]], 1 / (size * spacing**2), np.float32(1e9))

    near = np.floor(np.arange(SIZE) / spacing - 0.5).astype(int) + 1
    top, owner = np.zeros_like(X), np.zeros_like(X)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cell_y, cell_x, cell_size, cell_narrowness, cell_identity = (
            table[near + row].take(near + column, axis=1) for table in (y, x, size, narrowness, identity))
        crown = cell_size - ((Y - cell_y) ** 2 + (X - cell_x) ** 2) * cell_narrowness
        np.copyto(owner, cell_identity, where=crown > top)
        np.maximum(top, crown, out=top)
    return top, owner


def split(position: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Which piece of this size each position lies in, and the offset from the middle of that piece."""
    index = np.floor(position / size)
    return index.astype(np.intp), position - (index + 0.5) * size


def paint(ground: tuple, where: np.ndarray, *values) -> None:
    """Write a cover code, mix and tone (arrays or numbers) into the fields of `ground` where the mask is."""
    for field, value in zip(ground, values, strict=True):
        np.copyto(field, value, where=where)


def pick(rng: np.random.Generator, count: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """`count` random numbers in 0..1 for each (row, column), the same wherever the pair is the same."""
    period = 32  # more rows of parcels or lots than a tile shows; a power of 2, as & is much faster than %
    table = rng.random((count, period * period), np.float32)
    return table.take((row & period - 1) * period + (column & period - 1), axis=1)


def lay_parcels(site: Site, rng: np.random.Generator, ground: tuple, zone: np.ndarray) -> np.ndarray:
    """Paint fields, yards, streets and roofs on the ground; return the height of the roofs, metres.

    Parcels are offset rows of rectangles; `zone` at its middle says if a parcel is farmed, built or wild.
    """
    angle, lot = rng.uniform(0, math.pi), math.exp(rng.uniform(math.log(17), math.log(45)))
    lots_u, lots_v = rng.integers(2, 5, 2).tolist()
    u, v = rotated(angle, site.scale)
    across, du = split(u, lot * lots_u)
    along, dv = split(v + 200 * pick(rng, 1, across, across)[0], lot * lots_v)
    edge = lot / 2 * np.minimum(lots_u - np.abs(du) * (2 / lot), lots_v - np.abs(dv) * (2 / lot))  # m inside

    cos, sin = math.cos(angle) / site.scale, math.sin(angle) / site.scale
    y, x = (Y - du * sin - dv * cos).astype(np.intp), (X - du * cos + dv * sin).astype(np.intp)
    middle = zone.take((y & SIZE - 1) * SIZE + (x & SIZE - 1))  # the field is periodic
    farm_below, built_above = np.quantile(zone[::2, ::2], (site.farm, 1 - site.built))  # a quarter is enough
    farm, built = middle < farm_below, middle > built_above

    growth, lengthwise, contrast = pick(rng, 3, across, along)
    rows = np.sin(np.where(lengthwise < 0.5, du, dv) * (2 * math.pi / rng.uniform(3, 8)))
    paint(ground, farm, CROP, growth, 1 + 0.4 * contrast * rows)
    paint(ground[:1], built, YARD)
    street = edge < np.where(built, 4, rng.uniform(0.5, 2.5))
    paint(ground, street & (farm | built), PAVED, rng.uniform(0, 0.6), 1)

    lot_u, a = split(du + lot * lots_u / 2, lot)
    lot_v, b = split(dv + lot * lots_v / 2, lot)
    length, depth, colour = pick(rng, 3, across * lots_u + lot_u, along * lots_v + lot_v)
    inside_a, inside_b = lot * (0.22 + 0.14 * length) - np.abs(a), lot * (0.15 + 0.15 * depth) - np.abs(b)
    roof = built & (inside_a > 0) & (inside_b > 0)
    paint(ground, roof, ROOF, colour, 1)
    pitch = 0.55 if lot < 30 else 0.0  # houses have gables, halls are flat
    return roof * (3.5 + pitch * inside_b)


def make_scene(site: Site, rng: np.random.Generator) -> Scene:
    """Fields of a place of this kind."""
    terrain = make_terrain(site, rng)
    south, east = np.gradient(terrain, site.scale)
    slope = np.sqrt(south**2 + east**2)  # np.hypot is several times slower
    texture, patch = spectral_noise(rng, rng.uniform(0.5, 1.3)), spectral_noise(rng, rng.uniform(1.2, 2.0))
    water_share = site.water if site.water > 0.03 else 0.0  # less makes puddles, not a pond or a river
    level, bank = np.quantile(terrain, (water_share, min(1.15 * water_share, 1))).tolist()
    wet = np.exp((level - np.maximum(terrain, level)) / float(0.5 * terrain.std()))
    # Gullies and slopes that face north, away from the sun, keep their moisture.
    moisture = np.clip(site.moisture + 0.25 * (wet - wet.mean()) + 0.3 * south, 0, 0.97)

    dryness = 0.5 + 0.9 * (0.56 - moisture) + rng.normal(0, SEASON_SPREAD)
    ground = cover, mix, tone = (np.full(X.shape, GRASS), dryness + 0.12 * texture,
                                 1 + rng.uniform(0.03, 0.12) * texture + rng.uniform(0, 0.1) * patch)
    rocky = slope * (1 / site.relief) + rng.uniform(0.5, 3) * spectral_noise(rng, 1.7)
    rock = rocky > np.quantile(rocky[::2, ::2], 1 - site.bare / (1 - site.farm - site.built))
    paint(ground, rock | (terrain < bank), BARE, 0.4 + 0.25 * texture, tone)
    roofs = lay_parcels(site, rng, ground, patch)
    paint(ground, terrain < level, WATER, rng.uniform(0, 1), 1 + 0.1 * patch)
    if rng.uniform() < 0.5:
        road = np.abs(wandering_line(rng, site.scale)) < rng.uniform(1.5, 4)
        paint(ground, road, PAVED, rng.uniform(), 1)
    surface = np.maximum(terrain, level) + roofs * (cover == ROOF)
    surface += rng.uniform(0.2, 0.7) * texture * (cover == BARE)  # rocks, clods

    wild = cover == GRASS
    rooted = PLANT_CHANCE.take(cover)
    for code, share, spacing, height in ((SHRUB, site.shrub_cover, rng.uniform(2.6, 3.6), 1.5),
                                         (TREE, site.tree_cover, rng.uniform(5, 9), 8.0)):  # metres
        chance = rooted * (share + share * (1 - share) * (1.2 * patch + wet))
        crowns, owner = scatter_plants(rng, chance, max(spacing / site.scale, 2.0))
        surface += height * crowns * (1 + 0.12 * texture)
        paint(ground, crowns > 0, code, dryness + 0.5 * owner - 0.25, 0.75 + 0.5 * owner + 0.08 * texture)
    return Scene(site.scale, wild * LOAD.take(cover), moisture, slope, surface, cover, mix, tone)


def light(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Sun and sky light on the surface, about 1 on open level ground; all that stands casts a shadow."""
    azimuth, elevation = rng.uniform(-1.4, 1.4), math.radians(rng.uniform(27, 55))
    toward = math.cos(azimuth), math.sin(azimuth)  # the sun as (y, x): in the southern half, for `moisture`
    gy, gx = np.gradient(scene.surface, scene.scale)
    facing = 1 - (gy * toward[0] + gx * toward[1]) / math.tan(elevation)
    direct = np.maximum(facing, 0) / np.sqrt(1 + gx * gx + gy * gy)
    reach = max(SHADOW_STEPS)
    padded = np.pad(scene.surface, reach, mode="edge")
    horizon = np.full_like(scene.surface, -np.inf)
    for step in SHADOW_STEPS:
        dy, dx = (round(step * part) + reach for part in toward)
        drop = step * scene.scale * math.tan(elevation)
        horizon = np.maximum(horizon, padded[dy:dy + SIZE, dx:dx + SIZE] - drop)
    sunlit = np.clip(1 - (horizon - scene.surface), 0, 1)  # a metre of penumbra
    if rng.uniform() < 0.25:
        sunlit *= 1 - 0.7 * np.clip(2 * spectral_noise(rng, 2.5) - 2, 0, 1)  # a cloud's shadow
    sky = rng.uniform(0.15, 0.35)
    return sky + (1 - sky) * direct * sunlit


def photograph(radiance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a camera of unknown settings makes of linear radiance (SIZE, SIZE, 3): 8-bit RGB."""
    image = radiance * np.exp(rng.normal(0, WHITE_BALANCE_SPREAD, 3)).astype(np.float32)
    image /= image.mean()
    image += rng.uniform(0, 0.35) * np.array((0.9, 1.0, 1.15), np.float32)  # haze
    grey = (image @ np.full(3, 1 / 3, np.float32))[..., None]  # several times faster than a mean over axis 2
    image = np.maximum(grey + rng.uniform(*SATURATION) * (image - grey), 0)
    image **= rng.uniform(*GAMMA)
    image *= rng.uniform(*EXPOSURE) / image.mean()
    blur = rng.uniform(0, 0.35)  # a blend with one neighbour shifts the image a little, which nobody sees
    image[1:] += blur * (image[:-1] - image[1:])
    image[:, 1:] += blur * (image[:, :-1] - image[:, 1:])
    image += rng.uniform(*SENSOR_NOISE) * rng.standard_normal((SIZE, SIZE, 1), np.float32)
    return (255 * np.clip(image, 0, 1)).astype(np.uint8)


def draw_scene(label: int, rng: np.random.Generator) -> Scene:
    """A scene of the class."""
    while True:
        scene = make_scene(draw_site(label, rng), rng)
        if scene.label() == label:
            return scene


def render(label: int, rng: np.random.Generator) -> np.ndarray:
    """One photograph, (SIZE, SIZE, 3) uint8, of a scene of the class CLASS_NAMES[label]."""
    scene = draw_scene(label, rng)
    spread = rng.normal(0, HUE_SPREAD, END_COLOURS.shape)
    spread += rng.normal(0, SHADE_SPREAD, (len(END_COLOURS), 2, 1))
    first, second = (END_COLOURS * np.exp(spread)).astype(np.float32).transpose(1, 0, 2)
    mix = np.clip(scene.mix, 0, 1)[..., None]
    reflectance = first.take(scene.cover, axis=0) + mix * (second - first).take(scene.cover, axis=0)
    return photograph(reflectance * (scene.tone * light(scene, rng))[..., None], rng)
