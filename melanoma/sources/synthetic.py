"""Synthetic dermoscopy images with masks and labels, for the demo and the tests: no download needed.

    python -m melanoma.sources.synthetic --out FOLDER [--train 240] [--val 60] [--test 100] [--seed 0]

writes images in the layout of the ISIC 2017 challenge. Each dermoscopic structure is rendered by its own function,
named by its dermoscopy term (pigment network, globules, streaks, blue-white veil, regression, milia-like cysts,
comedo-like openings, fissures). Light is absorbed as in skin: melanin and blood attenuate the skin colour
exponentially, so pale brown, dark brown and black are one pigment at growing density. The classes overlap on purpose: a
lesion's traits are sampled around a blend of its own class and a random one, so no classifier can be right every time.

Unless a function says otherwise, an image is float32 (height, width, 3) RGB, 0 to 255, and a map is float32 (height,
width).
"""

import argparse
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from melanoma.classes import CLASSES, KERATOSIS, MELANOMA
from melanoma.sources.layouts import challenge_2017
from melanoma.sources.records import SYNTHETIC_MARKER

import joblib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
ByteArray = NDArray[np.uint8]
Rng = np.random.Generator

FIRST_ID = 9_000_000  # far above the ids of ISIC 2017, so that no synthetic image is taken for one of them
CLASS_FRACTIONS = (0.60, 0.22, 0.18)  # nevus, melanoma, keratosis; the challenge has fewer of the last two
JPEG_QUALITY = 95
REFERENCE_HEIGHT = 240  # pixels; sizes of structures below are given for this image height
LINE_OVERSAMPLING = 3  # hairs and rulers are rendered this much larger, then reduced to smooth their edges
MARKER_TEXT = "These images are synthetic (python -m melanoma.sources.synthetic). They show no real lesions.\n"

# RGB, 0 to 255.
SKIN = (202.0, 187.0, 173.0)  # before absorption by melanin and blood
VEIL_COLOUR = (128.0, 128.0, 138.0)
SCAR_COLOUR = (226.0, 206.0, 199.0)
WAX_COLOUR = (176.0, 148.0, 112.0)
CYST_COLOUR = (238.0, 222.0, 190.0)

# Absorption per unit density in red, green, blue.
MELANIN = (0.34, 0.76, 1.05)
BLOOD = (0.06, 0.50, 0.42)
BLACK_FROM = 1.3  # melanin density above which brown turns to black

# Strength of each trait: mean for nevus, melanoma, keratosis, then the standard deviation of all three. Strengths are
# sampled and clipped to 0 and 1, so a mean below 0 makes a trait rare.
TRAITS: dict[str, tuple[float, float, float, float]] = {
    "size": (0.56, 0.70, 0.58, 0.22),
    "asymmetry": (0.22, 0.56, 0.22, 0.18),
    "raggedness": (0.26, 0.54, 0.26, 0.20),
    "sharpness": (0.28, 0.42, 0.72, 0.20),
    "density": (0.44, 0.60, 0.44, 0.20),
    "variety": (0.12, 0.70, 0.26, 0.18),
    "redness": (0.18, 0.38, 0.18, 0.20),
    "network": (0.70, 0.52, 0.05, 0.25),
    "globules": (0.55, 0.48, 0.05, 0.25),
    "streaks": (-0.10, 0.42, -0.15, 0.22),
    "veil": (-0.30, 0.42, -0.20, 0.26),
    "regression": (-0.20, 0.34, -0.20, 0.24),
    "wax": (-0.10, -0.10, 0.66, 0.22),
    "milia": (-0.20, -0.15, 0.48, 0.25),
    "openings": (-0.20, -0.10, 0.45, 0.25),
    "fissures": (-0.25, -0.20, 0.38, 0.28),
}
FAINTEST = 0.12  # strength from which a structure is rendered


@dataclass(frozen=True)
class Lesion:
    """Shape and place of a lesion, as maps (height, width)."""

    depth: FloatArray  # 1 at the core, 0 on the border, negative outside
    mask: BoolArray  # True inside
    unit: float  # pixels; one pixel at the reference height


def noise(shape: tuple[int, int], scale: float, rng: Rng, slope: float = 3.0) -> FloatArray:
    """Random map of mean 0 and standard deviation 1, smooth below `scale` pixels; a low `slope` keeps more detail."""
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :])
    weight = (1 + (frequency * scale) ** 2) ** (-slope / 2)
    weight[0, 0] = 0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * weight, s=shape)
    return (field / field.std()).astype(np.float32)


def smooth_step(value: FloatArray) -> FloatArray:
    """Smooth ramp from 0 (at 0 and below) to 1 (at 1 and above)."""
    value = np.clip(value, 0, 1)
    return value * value * (3 - 2 * value)


def blend(image: FloatArray, colour: tuple[float, float, float] | FloatArray, opacity: FloatArray) -> FloatArray:
    """Blends a colour, one for all pixels or one each, over an image with an opacity map, 0 to 1."""
    return image + (np.asarray(colour, np.float32) - image) * opacity[..., None]


def random_traits(label: int, rng: Rng) -> dict[str, float]:
    """Samples the strength of every trait of one lesion, around a blend of its class and a random class."""
    typical = rng.beta(7, 1.1)
    other = int(rng.integers(3))
    traits = {}
    for name, (*means, deviation) in TRAITS.items():
        mean = typical * means[label] + (1 - typical) * means[other]
        traits[name] = float(np.clip(rng.normal(mean, deviation), 0, 1))
    # Most lesions have one pattern: network, globules or neither (homogeneous); varied ones keep several.
    for index, name in enumerate(("network", "globules")):
        if rng.integers(3) != index:
            traits[name] *= 0.35 + 0.6 * traits["variety"]
    return traits


def random_lesion(shape: tuple[int, int], traits: dict[str, float], rng: Rng) -> Lesion:
    """Generates the shape of a lesion: a warped ellipse that covers about 5 % to 50 % of the image."""
    unit = min(shape) / REFERENCE_HEIGHT
    area = float(np.clip(0.05 * 9 ** traits["size"], 0.05, 0.5) * rng.uniform(0.8, 1.2))
    radius = np.sqrt(area * shape[0] * shape[1] / np.pi)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    shift = rng.normal(0, 0.07, 2).clip(-0.15, 0.15)
    y, x = y - shape[0] * (0.5 + shift[0]), x - shape[1] * (0.5 + shift[1])
    warp = radius * (0.03 + 0.30 * traits["asymmetry"])
    x += warp * noise(shape, 4.5 * radius, rng)
    y += warp * noise(shape, 4.5 * radius, rng)
    angle = rng.uniform(0, np.pi)
    stretch = np.exp(rng.normal(0, 0.10 + 0.12 * traits["asymmetry"]))
    across = (x * np.cos(angle) + y * np.sin(angle)) * stretch
    along = (y * np.cos(angle) - x * np.sin(angle)) / stretch
    ragged = 0.02 + 0.16 * traits["raggedness"] ** 1.5
    level = -np.hypot(across, along) / radius + ragged * noise(shape, 1.2 * radius, rng, slope=2.4)
    if traits["streaks"] > FAINTEST:
        level += streaks(np.arctan2(along, across), traits["streaks"], rng)
    level -= np.quantile(level, 1 - area)
    mask = filled_largest_part(ndimage.gaussian_filter(level, 0.8 * unit) > 0)
    # No pigment outside the mask, no holes inside it.
    depth = np.where(mask, np.maximum(level, 0), np.minimum(level, 0)) / level.max()
    return Lesion(depth.astype(np.float32), mask, unit)


def filled_largest_part(mask: BoolArray) -> BoolArray:
    """The largest connected component of a mask, its holes filled."""
    labels, _ = ndimage.label(mask)
    largest = np.bincount(labels.ravel())[1:].argmax() + 1
    return ndimage.binary_fill_holes(labels == largest)


def streaks(angle: FloatArray, strength: float, rng: Rng) -> FloatArray:
    """Radial fingers (pseudopods) in one sector of the border; `angle` is a map in radians."""
    count = 512
    spikes = np.maximum(noise((1, count), count / 14, rng, slope=6.0)[0], 0) ** 1.5
    sector = smooth_step(0.5 + noise((1, count), count, rng)[0])
    index = ((angle + np.pi) / (2 * np.pi) * (count - 1)).astype(int)
    return (0.14 * strength * spikes * sector)[index]


def patch(lesion: Lesion, fraction: float, softness: float, rng: Rng) -> FloatArray:
    """A soft irregular zone, 0 to 1, over about `fraction` of the lesion and off its centre."""
    shape = lesion.depth.shape
    radius = np.sqrt(lesion.mask.sum() / np.pi)
    field = noise(shape, 3.5 * radius, rng, slope=3.0) + 0.6 * lesion.depth
    threshold = np.quantile(field[lesion.mask], 1 - fraction)
    return smooth_step((field - threshold) / softness + 0.5)


def scatter(lesion: Lesion, count: int, radius: tuple[float, float], min_depth: float, rng: Rng) -> FloatArray:
    """Soft round dots, 0 to 1, in the lesion where its depth is above `min_depth`; radii in units."""
    field = np.zeros(lesion.depth.shape, np.float32)
    places = np.argwhere(lesion.depth > min_depth)
    if len(places) == 0:
        return field
    for row, column in places[rng.integers(len(places), size=count)]:
        size = max(rng.uniform(*radius) * lesion.unit, 0.7)
        reach = int(size * 2) + 2
        top, left = max(row - reach, 0), max(column - reach, 0)
        view = field[top : row + reach, left : column + reach]
        y, x = np.ogrid[top - row : top - row + view.shape[0], left - column : left - column + view.shape[1]]
        oval = rng.uniform(0.75, 1.33)
        dot = np.exp(-(((x * x * oval + y * y / oval) / size**2) ** 1.2)) * rng.uniform(0.3, 1)
        np.maximum(view, dot, out=view)
    return field


def pigment_network(lesion: Lesion, irregular: float, rng: Rng) -> FloatArray:
    """Honeycomb of dark lines, -0.5 in the pale holes to 1 on the lines: three warped waves, 60 degrees apart."""
    shape = lesion.depth.shape
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    cell = rng.uniform(4.5, 7.5) * lesion.unit
    # The warp must be smoother than a cell, or the holes become slits.
    warp = cell * (0.55 + 0.8 * irregular)
    x = x + warp * noise(shape, 7 * cell, rng, slope=5.0)
    y = y + warp * noise(shape, 7 * cell, rng, slope=5.0)
    waves = np.zeros(shape, np.float32)
    for angle in rng.uniform(0, np.pi) + np.arange(3) * np.pi / 3:
        waves += np.cos((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / cell)
    lines = 1.5 * smooth_step((1.3 - waves) / 2.6) - 0.5
    patchy = smooth_step(0.6 + (0.25 + 0.5 * irregular) * noise(shape, 14 * cell, rng, slope=2.4))
    return patchy * lines * (1 + 0.35 * noise(shape, 4 * cell, rng))


def melanin_density(lesion: Lesion, traits: dict[str, float], rng: Rng) -> FloatArray:
    """Melanin map: an edge profile with uneven pigment, blotches, network and globules."""
    shape, variety = lesion.depth.shape, traits["variety"]
    fade = 0.55 * (1 - traits["sharpness"]) ** 1.5 + 0.05
    cover = smooth_step((lesion.depth + 0.03) / fade) ** 0.8
    uneven = np.exp((0.12 + 0.30 * variety) * noise(shape, 50 * lesion.unit, rng, slope=2.0))
    density = 0.30 * 6.5 ** traits["density"] * cover * uneven
    density *= 1 + rng.uniform(-0.3, 0.7) * smooth_step(lesion.depth)
    if variety > FAINTEST:
        density *= 1 + 1.5 * variety * patch(lesion, rng.uniform(0.1, 0.45), 0.7, rng)
        density *= 1 - 0.6 * variety * patch(lesion, rng.uniform(0.1, 0.4), 0.9, rng)
    if traits["network"] > FAINTEST:
        density *= 1 + 0.65 * traits["network"] * pigment_network(lesion, variety, rng)
    if traits["globules"] > FAINTEST:
        count = int(lesion.mask.sum() / lesion.unit**2 / 90 * traits["globules"])
        radius = (1.5, 2.4 + 2.2 * variety)
        density += 0.6 * traits["globules"] * scatter(lesion, count, radius, 0.05, rng) * (0.4 + density)
    return np.maximum(density, 0)


def skin(shape: tuple[int, int], unit: float, rng: Rng) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Generates bare skin: its colour, float32 (3,), and maps of its melanin and its blood."""
    # Green and blue change together, from warm to cool; changing one alone would make skin magenta or green.
    warmth = rng.normal(0, 0.06)
    hue = np.array((1 + 0.2 * warmth, 1 - warmth, 1 - 1.3 * warmth)) + rng.normal(0, (0.01, 0.01, 0.03))
    colour = np.array(SKIN) * rng.normal(1.04, 0.09) * hue
    furrows = np.exp(-3 * np.abs(noise(shape, 16 * unit, rng, slope=4.0)))
    melanin = 0.09 * rng.uniform(0.1, 1) * furrows + 0.025 * noise(shape, 7 * unit, rng, slope=2.0)
    melanin += 0.04 * noise(shape, 130 * unit, rng)
    melanin += rng.uniform(0.02, 0.06) * noise(shape, 40 * unit, rng, slope=2.2)
    if rng.random() < 0.3:
        freckles = smooth_step(noise(shape, 60 * unit, rng, slope=2.6) - 1.2)
        melanin += rng.uniform(0.1, 0.4) * freckles
    if rng.random() < 0.2:
        melanin += 0.5 * rng.beta(1, 2)
    vessels = np.exp(-8 * np.abs(noise(shape, 50 * unit, rng, slope=2.8)))
    vessels *= smooth_step(noise(shape, 90 * unit, rng))
    blood = 0.35 * rng.beta(1.2, 4) + 0.05 * noise(shape, 90 * unit, rng, slope=2.2)
    return colour.clip(90, 245).astype(np.float32), melanin, blood + rng.uniform(0, 0.35) * vessels


def absorb(colour: FloatArray, melanin: FloatArray, blood: FloatArray, tint: FloatArray) -> FloatArray:
    """The image after absorption by melanin and blood maps; `tint`, float32 (3,), scales melanin's absorption."""
    black = np.maximum(melanin - BLACK_FROM, 0) * 0.8
    loss = melanin[..., None] * (np.array(MELANIN, np.float32) * tint) + black[..., None]
    return colour * np.exp(-loss - blood[..., None] * np.array(BLOOD, np.float32))


def blue_white_veil(image: FloatArray, lesion: Lesion, strength: float, rng: Rng) -> FloatArray:
    """Confluent blue-grey zone under a whitish haze."""
    zone = patch(lesion, 0.08 + 0.4 * strength, 1.6, rng) * smooth_step(lesion.depth * 4)
    haze = 1 + 0.15 * noise(lesion.depth.shape, 30 * lesion.unit, rng, slope=2.2)
    tone = np.array(VEIL_COLOUR) * rng.normal(1, 0.12) * rng.normal(1, (0.05, 0.02, 0.05))
    return blend(image, (tone * haze[..., None]).astype(np.float32), zone * (0.25 + 0.5 * strength))


def regression(image: FloatArray, lesion: Lesion, strength: float, rng: Rng) -> FloatArray:
    """White scar-like zone with blue-grey dots (peppering)."""
    zone = patch(lesion, 0.06 + 0.3 * strength, 1.0, rng) * smooth_step(lesion.depth * 4)
    image = blend(image, SCAR_COLOUR, zone * (0.3 + 0.5 * strength))
    return blend(image, VEIL_COLOUR, 0.6 * zone * scatter(lesion, int(150 * strength), (0.8, 1.4), 0.1, rng))


def waxy_surface(image: FloatArray, lesion: Lesion, strength: float, rng: Rng) -> FloatArray:
    """Dull yellow to grey-brown film with a bumpy relief, lit from one side."""
    shape = lesion.depth.shape
    cover = smooth_step(lesion.depth * 12)
    tone = np.array(WAX_COLOUR, np.float32) * rng.normal(1, 0.10) * rng.normal(1, (0.02, 0.03, 0.12))
    brightness = image.mean(axis=2, keepdims=True) / np.mean(WAX_COLOUR)
    image = blend(image, (tone * (0.25 + 0.75 * brightness)).astype(np.float32), 0.75 * strength * cover)
    height = noise(shape, 45 * lesion.unit, rng, slope=3.5) * 5 + 40 * np.sqrt(np.maximum(lesion.depth, 0))
    height = ndimage.gaussian_filter(height, 1.5 * lesion.unit)
    angle = rng.uniform(0, 2 * np.pi)
    slope_y, slope_x = np.gradient(height)
    relief = (slope_x * np.cos(angle) + slope_y * np.sin(angle)).clip(-2, 2)
    shade = (1 + 0.13 * strength * relief * cover).astype(np.float32)
    return image * shade[..., None]


def fissures(image: FloatArray, lesion: Lesion, strength: float, rng: Rng) -> FloatArray:
    """Winding dark clefts between ridges."""
    field = noise(lesion.depth.shape, rng.uniform(35, 70) * lesion.unit, rng, slope=4.0)
    cleft = np.exp(-((field / rng.uniform(0.12, 0.3)) ** 2)) * smooth_step(lesion.depth * 6)
    cleft *= smooth_step(0.8 + 0.6 * noise(lesion.depth.shape, 90 * lesion.unit, rng))
    return image * np.exp(-cleft[..., None] * strength * np.array((0.45, 0.6, 0.7), np.float32))


def milia_like_cysts(image: FloatArray, lesion: Lesion, strength: float, rng: Rng) -> FloatArray:
    """Small bright round dots with a blurred rim."""
    count = int(rng.poisson(4 + 28 * strength))
    return blend(image, CYST_COLOUR, (0.3 + 0.45 * strength) * scatter(lesion, count, (1.4, 3.6), 0.08, rng))


def comedo_like_openings(image: FloatArray, lesion: Lesion, strength: float, rng: Rng) -> FloatArray:
    """Dark round plugs of keratin."""
    plugs = scatter(lesion, int(rng.poisson(3 + 22 * strength)), (1.8, 4.5), 0.06, rng)
    return image * np.exp(-plugs[..., None] * (0.4 + strength) * np.array((0.7, 0.95, 1.1), np.float32))


OVERLAYS: dict[str, Callable[[FloatArray, Lesion, float, Rng], FloatArray]] = {
    "wax": waxy_surface,
    "fissures": fissures,
    "veil": blue_white_veil,
    "regression": regression,
    "milia": milia_like_cysts,
    "openings": comedo_like_openings,
}


def render_lines(shape: tuple[int, int], lines: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> FloatArray:
    """Antialiased map, 0 to 1, of polylines: each of points (n, 2) as x, y and widths (n,), in pixels."""
    factor = LINE_OVERSAMPLING
    canvas = Image.new("L", (shape[1] * factor, shape[0] * factor))
    pen = ImageDraw.Draw(canvas)
    for points, widths in lines:
        segments = zip(points[:-1] * factor, points[1:] * factor, widths[:-1] * factor, strict=True)
        for start, end, width in segments:
            pen.line((*start, *end), fill=255, width=max(1, round(width)))
    return np.asarray(canvas.reduce(factor), np.float32) / np.float32(255)


def hairs(image: FloatArray, unit: float, rng: Rng) -> FloatArray:
    """Curved hairs that taper to the tip, mostly dark, rarely fair, from one to many."""
    shape = image.shape[:2]
    main_angle = rng.uniform(0, 2 * np.pi)
    count = int(rng.geometric(0.2)) if rng.random() < 0.8 else int(rng.uniform(15, 40))
    step = np.linspace(0, 1, 24)
    thickness = rng.uniform(0.8, 1.9)
    lines = []
    for _ in range(count):
        angle = rng.normal(main_angle, 0.6) + rng.normal(0, 1.1) * step + rng.normal(0, 1.0) * step**2
        stride = rng.uniform(40, 260) * unit / len(step)
        path = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], axis=1) * stride, axis=0)
        root = rng.uniform(-0.1, 1.0, 2) * (shape[1], shape[0])
        lines.append((root + path, rng.uniform(0.5, 1.0) * thickness * unit * (1 - 0.7 * step)))
    cover = render_lines((shape[0], shape[1]), lines)
    fair = rng.random() < 0.12
    colour = (232.0, 214.0, 190.0) if fair else tuple(rng.uniform(15, 60) * np.array((1.25, 1.0, 0.9)))
    return blend(image, np.array(colour, np.float32), cover * rng.uniform(0.55, 0.95))


def ruler_marks(image: FloatArray, unit: float, rng: Rng) -> FloatArray:
    """A printed scale near one edge: a base line with a tick each millimetre, every fifth longer."""
    height, width = image.shape[:2]
    along = np.array([1.0, rng.normal(0, 0.15)])
    along /= np.hypot(*along)
    across = np.array([along[1], -along[0]])
    start = np.array([width * rng.uniform(0.05, 0.5), height * rng.choice([0.08, 0.9])])
    gap = rng.uniform(5, 9) * unit
    count = 21
    pen = np.full(2, 0.8 * unit)
    lines = [(np.array([start, start + along * gap * (count - 1)]), pen)]
    for tick in range(count):
        foot = start + along * gap * tick
        lines.append((np.array([foot, foot + across * gap * (1.3 if tick % 5 == 0 else 0.7)]), pen))
    return blend(image, (40.0, 38.0, 40.0), 0.8 * render_lines((height, width), lines))


def gel_bubbles(image: FloatArray, unit: float, rng: Rng) -> FloatArray:
    """Air bubbles in the contact gel: a thin dark rim, bright on the side of the light."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(int(rng.integers(1, 7))):
        radius = rng.uniform(3, 11) * unit
        dx, dy = x - rng.uniform(0, width), y - rng.uniform(0, height)
        rim = np.exp(-(((np.hypot(dx, dy) - radius) / (0.9 * unit)) ** 2))
        image = image * (1 - 0.22 * rim + 0.4 * rim * smooth_step((-dx - dy) / radius - 0.5))[..., None]
    return image


def specular_highlights(image: FloatArray, unit: float, rng: Rng) -> FloatArray:
    """Small reflections of the light on the gel and on skin ridges."""
    shape = (image.shape[0], image.shape[1])
    glint = smooth_step((noise(shape, 7 * unit, rng, slope=3.0) - rng.uniform(2.4, 3.2)) * 2)
    glint *= smooth_step(0.5 + noise(shape, 150 * unit, rng))
    return blend(image, (250.0, 248.0, 245.0), 0.7 * glint)


# Each with the fraction of images that have it.
ARTEFACTS: dict[Callable[[FloatArray, float, Rng], FloatArray], float] = {
    specular_highlights: 0.6,
    hairs: 0.45,
    ruler_marks: 0.2,
    gel_bubbles: 0.15,
}


def lighting(image: FloatArray, rng: Rng) -> FloatArray:
    """Uneven light: a brightness gradient, a fall-off to the corners and a colour cast."""
    height, width = image.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0, 0.08) * (x * np.cos(angle) + y * np.sin(angle))
    light -= rng.uniform(0, 0.16) * (x * x + y * y)
    return image * light[..., None] * rng.normal(1, 0.02, 3).astype(np.float32)


def vignette(image: FloatArray, rng: Rng) -> FloatArray:
    """Dark round corners outside the eyepiece."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    middle = rng.normal(0.5, 0.015, 2) * (height, width)
    distance = np.hypot(y - middle[0], x - middle[1]) / np.hypot(height, width) * 2
    rim = rng.uniform(0.78, 0.98)
    return image * (1 - 0.97 * smooth_step((distance - rim) / rng.uniform(0.02, 0.15)))[..., None]


def sensor(image: FloatArray, unit: float, rng: Rng) -> ByteArray:
    """Lens blur and noise, then 8 bits: uint8 (height, width, 3)."""
    sigma = rng.uniform(0.35, 0.9) * unit
    image = ndimage.gaussian_filter(image, (sigma, sigma, 0))
    image = image + rng.standard_normal(image.shape, np.float32) * rng.uniform(0.8, 2.5)
    return image.round().clip(0, 255).astype(np.uint8)


def generate(label: int, size: tuple[int, int], rng: Rng) -> tuple[ByteArray, ByteArray]:
    """Generates one image and its lesion mask.

    Args:
        label: index into `CLASSES`.
        size: (height, width) in pixels, each at least 32.
        rng: determines everything random.

    Returns:
        Image, uint8 (height, width, 3) RGB, and mask, uint8 (height, width), 1 inside the lesion, 0 outside.

    Raises:
        ValueError: another label or a smaller size.
    """
    if label not in range(len(CLASSES)):
        raise ValueError(f"label must be 0 to {len(CLASSES) - 1}, not {label}")
    if min(size) < 32:
        raise ValueError(f"size must be at least 32 x 32 pixels, not {size[0]} x {size[1]}")
    traits = random_traits(label, rng)
    lesion = random_lesion(size, traits, rng)
    unit = lesion.unit
    colour, melanin, blood = skin(size, unit, rng)
    melanin = np.maximum(melanin + melanin_density(lesion, traits, rng), 0)
    inflamed = 0.7 + 0.3 * noise(size, 80 * unit, rng)
    blood = np.maximum(blood + 0.6 * traits["redness"] * smooth_step((lesion.depth + 0.1) * 4) * inflamed, 0)
    image = absorb(colour, melanin, blood, rng.normal(1, (0.10, 0.05, 0.05)).astype(np.float32))
    for name, overlay in OVERLAYS.items():
        if traits[name] > FAINTEST:
            image = overlay(image, lesion, traits[name], rng)
    for artefact, fraction in ARTEFACTS.items():
        if rng.random() < fraction:
            image = artefact(image, unit, rng)
    image = lighting(image, rng)
    if rng.random() < 0.25:
        image = vignette(image, rng)
    return sensor(image, unit, rng), lesion.mask.astype(np.uint8)


def class_order(count: int, rng: Rng) -> NDArray[np.int64]:
    """Shuffled labels (count,) in the proportions of CLASS_FRACTIONS, every class at least once from 3 images on."""
    rare = [max(round(fraction * count), int(count >= len(CLASS_FRACTIONS))) for fraction in CLASS_FRACTIONS[1:]]
    labels = np.repeat(np.arange(len(CLASS_FRACTIONS)), [count - sum(rare), *rare])
    return rng.permutation(labels)


def write_sample(
    folder: Path, counts: Mapping[str, int], seed: int = 0, size: tuple[int, int] = (240, 320), jobs: int = 1
) -> None:
    """Writes synthetic images, masks and labels in the ISIC 2017 layout, and a file that marks the folder as synthetic.

    An image depends only on its label, `size`, `seed` and its number, counted over all splits: writing again gives the
    same bytes.

    Args:
        folder: created if missing.
        counts: images per split, 0 or more; a split that is not named is not written.
        seed: seed of everything random.
        size: (height, width) in pixels, each at least 32.
        jobs: processes that generate images.

    Raises:
        ValueError: an unknown split or a negative count.
    """
    unknown = set(counts) - set(challenge_2017.NAMES)
    if unknown or min(counts.values(), default=0) < 0:
        splits = ", ".join(challenge_2017.NAMES)
        raise ValueError(f"counts must be 0 or more for splits {splits}, not {dict(counts)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SYNTHETIC_MARKER).write_text(MARKER_TEXT)
    number, images = 0, []
    for index, split in enumerate(challenge_2017.NAMES):
        if split not in counts:
            continue
        labels = class_order(counts[split], np.random.default_rng([seed, FIRST_ID, index])).tolist()
        write_labels(folder, split, labels, number)
        images += [(split, one, label) for one, label in enumerate(labels, number)]
        number += len(labels)
    joblib.Parallel(n_jobs=jobs)(
        joblib.delayed(write_image)(folder, split, one, label, seed, size) for split, one, label in images
    )


def image_id(number: int) -> str:
    """Id of an image from its number."""
    return f"ISIC_{FIRST_ID + number:07d}"


def write_labels(folder: Path, split: str, labels: Sequence[int], first: int) -> None:
    """Writes the label file of a split and creates its folders; the images are numbered from `first`."""
    challenge_2017.image_folder(folder, split).mkdir(parents=True, exist_ok=True)
    challenge_2017.mask_folder(folder, split).mkdir(parents=True, exist_ok=True)
    with challenge_2017.label_file(folder, split).open("w", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["image_id", "melanoma", "seborrheic_keratosis"])
        for number, label in enumerate(labels, first):
            table.writerow([image_id(number), float(label == MELANOMA), float(label == KERATOSIS)])


def write_image(folder: Path, split: str, number: int, label: int, seed: int, size: tuple[int, int]) -> None:
    """Generates and writes one image and its mask; arguments as of `write_sample`."""
    image, mask = generate(label, size, np.random.default_rng([seed, number]))
    name = image_id(number)
    Image.fromarray(image).save(challenge_2017.image_folder(folder, split) / f"{name}.jpg", quality=JPEG_QUALITY)
    Image.fromarray(mask * np.uint8(255)).save(challenge_2017.mask_folder(folder, split) / f"{name}_segmentation.png")


def main(arguments: list[str] | None = None) -> None:
    """The command line; `arguments` defaults to those of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m melanoma.sources.synthetic",
        description="Generate synthetic dermoscopy images with masks and labels in the ISIC 2017 layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to fill; created if missing")
    parser.add_argument("--train", type=int, default=240, help="training images")
    parser.add_argument("--val", type=int, default=60, help="validation images")
    parser.add_argument("--test", type=int, default=100, help="test images")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    options = parser.parse_args(arguments)
    counts = {"train": options.train, "val": options.val, "test": options.test}
    if min(*counts.values(), options.seed) < 0:
        parser.error("--train, --val, --test and --seed must be 0 or more")
    try:
        write_sample(options.out, counts, options.seed, jobs=joblib.cpu_count())
    except OSError as error:
        parser.exit(2, f"{parser.prog}: cannot write {error.filename or options.out}: {error.strerror}\n")
    print(f"Wrote {sum(counts.values())} synthetic images with masks and labels to {options.out}")


if __name__ == "__main__":
    main()
