"""Images that are not dermoscopic images of a lesion, and dermoscopic images unlike those of training."""

import csv
import itertools
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path

from melanoma.dataset import decode

import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

SIZE = 256  # pixels; side of all images
DRAWN = 20  # images of each kind that is drawn
EACH = 150  # of HAM10000 by diagnosis, at most
SKIN = 100  # images of skin
SKIN_MARGIN, SKIN_SIDE, DARKEST = 10, 80, 50  # pixels from the lesion; pixels, smallest side; grey value of skin
LIGHT, BROWN = (215, 165, 150), (90, 55, 45)  # RGB of skin and of a lesion
OTHERS, KNOWN = ("bcc", "akiec", "scc", "vasc", "df"), ("mel", "bkl", "nv")  # diagnoses of HAM10000
Rng = np.random.Generator


def read(path: Path) -> np.ndarray:
    """A file as the networks see it, uint8 (SIZE, SIZE, 3)."""
    return decode.read_pair(path, None, SIZE).image


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Rounds and clips to uint8."""
    return np.asarray(values).round().clip(0, 255).astype(np.uint8)


def white_noise(rng: Rng) -> np.ndarray:
    """Independent pixels."""
    return rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)


def tinted_noise(rng: Rng) -> np.ndarray:
    """Independent pixels around a colour."""
    return to_bytes(rng.uniform(40, 215, 3) + rng.uniform(10, 60) * rng.standard_normal((SIZE, SIZE, 3)))


def smooth_noise(rng: Rng) -> np.ndarray:
    """Blurred noise of random scale around a colour."""
    noise = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE, 3)), (*2 * [rng.uniform(3, 30)], 0))
    return to_bytes(rng.uniform(60, 195, 3) + rng.uniform(20, 60) * noise / noise.std())


def skin_coloured_noise(rng: Rng) -> np.ndarray:
    """Smooth noise from light skin to brown."""
    scale = rng.uniform(3, 30)
    dark = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE, 1)), (scale, scale, 0))
    dark = np.clip(0.3 + 0.3 * dark / dark.std(), 0, 1)
    return to_bytes(np.array(LIGHT) * (1 - dark) + np.array(BROWN) * dark + rng.normal(0, 10, 3))


def one_colour(rng: Rng) -> np.ndarray:
    """One random colour."""
    return np.broadcast_to(rng.integers(0, 256, 3).astype(np.uint8), (SIZE, SIZE, 3)).copy()


def gradient(rng: Rng) -> np.ndarray:
    """From one random colour to another, in a random direction."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    along = ((x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2) + 1)[..., None] / 2
    return to_bytes(rng.uniform(0, 255, 3) * along + rng.uniform(0, 255, 3) * (1 - along))


def black_frame(rng: Rng) -> np.ndarray:
    """A disc or a rectangle of one colour on black, as an eyepiece or a screen without image."""
    picture = Image.new("RGB", (SIZE, SIZE))
    middle, half = rng.uniform(90, 166, 2), rng.uniform(30, 110, 2)
    disc = rng.random() < 0.5
    half = half[[0, 0]] if disc else half
    pen = ImageDraw.Draw(picture)
    draw = pen.ellipse if disc else pen.rectangle
    draw([*(middle - half), *(middle + half)], fill=tuple(rng.integers(60, 256, 3).tolist()))
    return np.asarray(picture)


def text_page(rng: Rng) -> np.ndarray:
    """Lines of random words, in one of several sizes; some light on dark."""
    paper, ink = (int(rng.integers(225, 256)), int(rng.integers(0, 70)))
    if rng.random() < 0.2:
        paper, ink = ink, paper
    picture = Image.new("RGB", (2 * SIZE, 2 * SIZE), 3 * (paper,))
    pen, height = ImageDraw.Draw(picture), int(rng.integers(12, 40))
    letters = np.array([*string.ascii_lowercase])
    for top in range(int(rng.integers(10, 60)), 2 * SIZE - 2 * height, round(1.4 * height)):
        words = ("".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(1000 // (height * 3)))
        pen.text((20, top), " ".join(words), 3 * (ink,), ImageFont.load_default(height))
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def skin(image: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """The largest square of skin beside a lesion, enlarged to the image's size; None: it is too small.

    Args:
        image: uint8 (S, S, 3).
        mask: uint8 (S, S, 1), {0, 1}, the lesion.
    """
    lesion = ndimage.binary_dilation(mask[..., 0], iterations=SKIN_MARGIN)
    free = np.pad(~lesion & (ndimage.median_filter(image.mean(axis=2), 5) > DARKEST), 1)
    distance = ndimage.distance_transform_cdt(free, "chessboard")
    y, x = np.unravel_index(np.argmax(distance), distance.shape)
    half = int(distance[y, x]) - 1
    if 2 * half + 1 < SKIN_SIDE:
        return None
    square = image[y - 1 - half : y + half, x - 1 - half : x + half]
    return np.asarray(Image.fromarray(square).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


DRAWINGS: dict[str, Callable[[Rng], np.ndarray]] = {
    "white noise": white_noise,
    "noise around a colour": tinted_noise,
    "smooth noise": smooth_noise,
    "smooth noise in skin colours": skin_coloured_noise,
    "one colour": one_colour,
    "colour gradient": gradient,
    "black frame": black_frame,
    "page of text": text_page,
}
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of images, uint8 (N, SIZE, SIZE, 3)
    "validation, blurred (sigma 8 pixels)": lambda images: ndimage.gaussian_filter(images, (0, 8, 8, 0)),
    "validation, dark (8 percent of the brightness)": lambda images: to_bytes(0.08 * images),
    "validation, overexposed (300 percent)": lambda images: to_bytes(3.0 * images),
}


def scikit_image_images() -> np.ndarray:
    """The images that scikit-image's package contains: uint8 (N, SIZE, SIZE, 3)."""
    folder = Path(skimage.__file__).parent / "data"
    return np.stack([read(path) for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg")])


def skins(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The first SKIN pieces of skin that these images contain, see `skin`: uint8 (N, SIZE, SIZE, 3)."""
    found = (skin(image, mask) for image, mask in zip(images, masks, strict=True))
    return np.stack([*itertools.islice((one for one in found if one is not None), SKIN)])


def ham10000(source: Path) -> dict[str, Callable[[], np.ndarray]]:
    """By diagnosis, what reads the first EACH images of HAM10000."""
    with (source / "HAM10000_metadata.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))

    def load(diagnosis: str) -> np.ndarray:
        ids = [row["image_id"] for row in rows if row["dx"] == diagnosis][:EACH]
        return np.stack([read(source / "images" / f"{one}.jpg") for one in ids])

    present = {row["dx"] for row in rows}
    return {f"HAM10000 {one}": partial(load, one) for one in (*OTHERS, *KNOWN) if one in present}


def draw(kind: str) -> np.ndarray:
    """DRAWN images of one of DRAWINGS."""
    rng = np.random.default_rng([*DRAWINGS].index(kind))
    return np.stack([DRAWINGS[kind](rng) for _ in range(DRAWN)])


def drawings() -> dict[str, Callable[[], np.ndarray]]:
    """What draws the images, by kind."""
    return {kind: partial(draw, kind) for kind in DRAWINGS}
