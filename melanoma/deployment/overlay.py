"""The overlay of one image: contour and crop, what the classifier sees, Grad-CAM, and the probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from melanoma.classes import CLASSES, MELANOMA
from melanoma.dataset import roi
from melanoma.inference import postprocess

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

TILE = 360  # pixels; height of the tiles
MAX_ASPECT = 2.5  # of a tile; longer images are stretched
GAP = 12  # pixels
BAR_HEIGHT, BAR_LEFT = 20, 190  # pixels
CONTOUR, BOX = "#ffd400", "#ffffff"
INK, QUIET, BAR, ALERT = "#1a1a1a", "#6b6b6b", "#1b6ca8", "#d1495b"


@dataclass(frozen=True)
class Finding:
    """What is known of one image."""

    name: str
    state: tuple[str, str]  # of its file, see `images.ImageFile.state`
    preview: np.ndarray  # uint8 (P, P, 3), the whole image, stretched to a square
    size: tuple[int, int]  # width and height of the file in pixels
    mask: np.ndarray  # uint8 (S, S, 1), {0, 1}
    cropped: bool  # whether the region of interest is a crop
    region: np.ndarray  # uint8 (R, R, 3)
    heatmap: np.ndarray | None  # float (h, w) in [0, 1], Grad-CAM of melanoma over the region; None: unknown
    probabilities: np.ndarray  # float (3,)
    thresholds: Mapping[str, float]  # of melanoma, by operating point
    flags: Sequence[str]

    @property
    def decisions(self) -> dict[str, str]:
        """Whether the image counts as melanoma, "yes" or "no", by operating point."""
        melanoma = self.probabilities[MELANOMA].item()
        return {point: "yes" if melanoma >= threshold else "no" for point, threshold in self.thresholds.items()}

    @property
    def to_check(self) -> str:
        """The flags as text; "" if there are none."""
        return "; ".join(self.flags)


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of Matplotlib, with Latin, Greek, Cyrillic and Arabic letters, among others."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def shortened(text: str, size: int, width: int) -> str:
    """As much of a text as fits into a width in pixels."""
    text, face = " ".join(text.splitlines()), font(size)
    letters = len(text)
    while letters and face.getlength(fitting := text if letters == len(text) else f"{text[:letters]}…") > width:
        letters -= 1
    return fitting if letters else ""


def with_contour(finding: Finding) -> Image.Image:
    """The whole image in its own aspect ratio, with the contour of the mask and the box of the crop."""
    width, height = finding.size
    width = round(TILE * min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT))
    picture = Image.fromarray(finding.preview).resize((width, TILE), Image.Resampling.BICUBIC)
    mask = finding.mask
    if mask.any() and not mask.all():
        large = postprocess.enlarge(mask, (width, TILE))[..., 0] > 0
        edge = large & ~ndimage.binary_erosion(large, iterations=2)
        picture.paste(CONTOUR, mask=Image.fromarray(edge))
        if finding.cropped:
            top, left, side = roi.lesion_box(mask)
            scale = np.array([width, TILE]) / len(mask)
            corners = [*(scale * (left, top)), *(scale * (left + side, top + side) - 1)]
            pen = ImageDraw.Draw(picture)
            pen.rectangle(corners, outline=BOX, width=4)
            pen.rectangle(corners, outline=INK)
    return picture


def with_heatmap(finding: Finding) -> Image.Image:
    """The region of interest under the colours of its Grad-CAM."""
    region = Image.fromarray(finding.region).resize((TILE, TILE), Image.Resampling.BICUBIC)
    assert finding.heatmap is not None
    heat = Image.fromarray((255 * finding.heatmap).astype(np.uint8)).resize((TILE, TILE), Image.Resampling.BICUBIC)
    colours = (255 * matplotlib.colormaps["inferno"](np.arange(256))[:, :3]).astype(np.uint8)
    return Image.blend(region, Image.fromarray(colours[np.asarray(heat)]), 0.5)


def draw(finding: Finding) -> Image.Image:
    """Draws the overlay.

    Returns:
        RGB, about 1200 x 540 pixels, depending on the image's aspect ratio.
    """
    region = Image.fromarray(finding.region).resize((TILE, TILE), Image.Resampling.BICUBIC)
    tiles = {
        "lesion (yellow) and crop (white)" if finding.cropped else "lesion (yellow)": with_contour(finding),
        "what the classifier sees": region,
        f"what speaks most for {CLASSES[MELANOMA]} (Grad-CAM)": with_heatmap(finding),
    }
    widths = [max(tile.width, round(font(14).getlength(title))) for title, tile in tiles.items()]
    width = sum(widths) + GAP * (len(tiles) + 1)
    bars_top = 2 * GAP + 24 + 22 + TILE
    canvas = Image.new("RGB", (width, bars_top + (BAR_HEIGHT + 8) * len(CLASSES) + 44), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, GAP - 2), shortened(finding.name, 18, width - 2 * GAP), INK, font(18))
    left = GAP
    for (title, tile), column in zip(tiles.items(), widths, strict=True):
        pen.text((left, GAP + 24), title, QUIET, font(14))
        canvas.paste(tile, (left, GAP + 24 + 22))
        left += column + GAP
    draw_bars(pen, finding, bars_top, width)
    return canvas


def draw_bars(pen: ImageDraw.ImageDraw, finding: Finding, top: int, width: int) -> None:
    """Draws the probabilities, melanoma first, with its thresholds; below them the flags."""
    full = width - BAR_LEFT - 70 - GAP
    for index in (MELANOMA, *(other for other in range(len(CLASSES)) if other != MELANOMA)):
        probability = float(finding.probabilities[index])
        positive = index == MELANOMA and probability >= min(finding.thresholds.values())
        pen.text((GAP, top + 1), CLASSES[index], INK, font(15))
        pen.rectangle((BAR_LEFT, top, BAR_LEFT + full, top + BAR_HEIGHT), outline="#d8d8d8")
        pen.rectangle(
            (BAR_LEFT, top, BAR_LEFT + round(full * probability), top + BAR_HEIGHT), fill=ALERT if positive else BAR
        )
        pen.text((BAR_LEFT + full + 10, top + 1), f"{probability:.3f}", INK, font(15))
        if index == MELANOMA:
            for threshold in finding.thresholds.values():
                x = BAR_LEFT + round(full * threshold)
                pen.line((x, top - 3, x, top + BAR_HEIGHT + 3), fill=INK, width=2)
        top += BAR_HEIGHT + 8
    points = ", ".join(f"{name} {threshold:.3f}" for name, threshold in finding.thresholds.items())
    pen.text((GAP, top), f"Lines: melanoma thresholds ({points}). Not a medical device.", QUIET, font(13))
    if finding.flags:
        pen.text((GAP, top + 20), f"Check: {finding.to_check}", ALERT, font(13))
