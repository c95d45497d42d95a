"""Schematics of the two networks for the README, drawn from the Keras models themselves.

    python -m melanoma.schematics [--graphics graphics]

writes segnet_schematic.png and densenet_flow.png. Sides, channels, counts and parameters are read from the layers; the
photograph is a drawn phantom. The weights are random: no figure shows what a trained network answers.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import log2
from pathlib import Path
from statistics import mode

import keras
import numpy as np
from keras import layers
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyBboxPatch, Patch, Polygon

from melanoma import classifier, images, isic, phantom, plots
from melanoma.segnet import build as build_segnet

SIZE, NETWORK_SIZE = 256, 200  # sides in pixels, the defaults of the scripts
BACKBONE = "densenet121"
MELANOMA, SEED = 1, 26  # the phantom: an irregular lesion of several browns, clear of the frame

BLUE, RED, GREEN = plots.LINES
YELLOW, GREY, PURPLE, INK = "#e9a820", "#8d99a6", "#6f5aa8", "#20262d"
PANEL = "#f3f5f8"
BIG, MEDIUM, SMALL = 16, 13.5, 12.5  # font sizes; a README shows the figures at half their size

# All lengths below are inches of the figure.
PIXEL = 2.05 / SIZE  # a pixel of a feature map's side
FILTER = 0.0032  # a filter of a slab's thickness
THINNEST = 0.05
DEPTH = (0.20, 0.13)  # the slabs' third dimension, right and up, as a share of the side
BOX_WIDTH = 0.56
LAYER = 0.078  # a layer of a dense block


@dataclass(frozen=True)
class Slab:
    """One layer of SegNet: its feature maps' side and number, and how it is drawn."""

    name: str
    side: int
    channels: int
    colour: str
    meaning: str


@dataclass(frozen=True)
class Box:
    """One step of the classifier; `count` is the number of layers of a dense block, 0 for other steps."""

    text: str
    shape: tuple[int, ...]
    colour: str
    count: int = 0

    @property
    def width(self) -> float:
        """Inches."""
        return max(1.15, (self.count + 3) * LAYER) if self.count else BOX_WIDTH

    @property
    def height(self) -> float:
        """Inches: falls with the side's logarithm, for every step that halves the side to look the same."""
        return 1.55 + 0.14 * log2(self.shape[0]) if len(self.shape) == 3 else 2.0


def shade(colour: str, share: float) -> tuple[float, ...]:
    """Mixes a colour with white (share above 0) or black (below)."""
    return tuple((1 - abs(share)) * value + max(share, 0) for value in to_rgb(colour))


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure whose coordinates are inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    return figure, axis


def write(axis: Axes, x: float, y: float, text: str, size: float = SMALL, **options: object) -> None:
    """Writes a text, centred on (x, y) unless `options` say otherwise."""
    axis.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "color": INK, **options})


def arrow(axis: Axes, *points: tuple[float, float]) -> None:
    """Draws an arrow along points; the head is at the last."""
    axis.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1.6, solid_capstyle="butt")
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.6, "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", points[-1], points[-2], arrowprops=style)


def picture(axis: Axes, image: np.ndarray, left: float, middle: float, side: float, title: str) -> None:
    """Shows a photograph or a mask, with a title under it."""
    extent = (left, left + side, middle - side / 2, middle + side / 2)
    axis.imshow(image, extent=extent, aspect="auto", cmap="gray", zorder=3)
    axis.add_patch(Polygon([(x, y) for x, y in zip(*corners(extent), strict=True)], fill=False, color=INK, zorder=4))
    write(axis, left + side / 2, extent[2] - 0.12, title, MEDIUM, va="top")


def corners(extent: tuple[float, float, float, float]) -> tuple[Sequence[float], Sequence[float]]:
    """The x and the y of a rectangle's corners."""
    left, right, bottom, top = extent
    return (left, right, right, left), (bottom, bottom, top, top)


def sample() -> tuple[np.ndarray, np.ndarray]:
    """The phantom: uint8 (SIZE, SIZE, 3) and its mask (SIZE, SIZE, 1)."""
    image, mask = phantom.draw(MELANOMA, (SIZE, SIZE), np.random.default_rng(SEED))
    return image, mask[..., None]


def meaning(layer: keras.Layer) -> tuple[str, str] | None:
    """Colour and legend of a layer of SegNet; None for those that belong to the convolution before them."""
    match layer:
        case layers.Conv2D() if layer.activation is keras.activations.sigmoid:
            return YELLOW, f"conv {layer.kernel_size[0]}×{layer.kernel_size[1]} + sigmoid"
        case layers.Conv2D():
            return BLUE, f"conv {layer.kernel_size[0]}×{layer.kernel_size[1]} + batch norm + ReLU"
        case layers.MaxPooling2D():
            return GREEN, f"max pooling {layer.pool_size[0]}×{layer.pool_size[1]}"
        case layers.UpSampling2D():
            return RED, f"upsampling {layer.size[0]}×{layer.size[1]}"
        case layers.Normalization() | layers.Resizing():
            return GREY, "standardise, resize"
    return None


def slabs(model: keras.Model) -> Iterator[Slab]:
    """The layers of SegNet that are drawn."""
    for layer in model.layers:
        if kind := meaning(layer):
            _, side, _, channels = layer.output.shape
            yield Slab(layer.name, side, channels, *kind)


def solid(axis: Axes, slab: Slab, left: float, middle: float) -> float:
    """Draws a slab in oblique projection, seen from the upper right; returns the x where its front ends."""
    right = left + max(THINNEST, slab.channels * FILTER)
    height = slab.side * PIXEL
    bottom, top = middle - height / 2, middle + height / 2
    dx, dy = (share * height for share in DEPTH)
    faces = {
        0.0: [(left, bottom), (right, bottom), (right, top), (left, top)],
        0.45: [(left, top), (right, top), (right + dx, top + dy), (left + dx, top + dy)],
        -0.25: [(right, bottom), (right + dx, bottom + dy), (right + dx, top + dy), (right, top)],
    }
    for share, points in faces.items():
        axis.add_patch(Polygon(points, facecolor=shade(slab.colour, share), edgecolor="white", linewidth=0.8, zorder=3))
    return right


def bracket(axis: Axes, left: float, right: float, y: float, text: str) -> None:
    """Draws a bracket over a part of the network, with its name."""
    axis.plot([left, left, right, right], [y - 0.1, y, y, y - 0.1], color=INK, linewidth=1.2)
    write(axis, (left + right) / 2, y + 0.2, text, BIG)


def panel(axis: Axes, left: float, right: float, bottom: float, top: float, title: str) -> None:
    """Draws a pale ground under the steps that lie inside a model, with the model's name on top."""
    style = "round,pad=0,rounding_size=0.12"
    corner, width, height = (left, bottom), right - left, top - bottom
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=PANEL, edgecolor="#d5dae1"))
    write(axis, (left + right) / 2, top - 0.26, title, BIG)


def segnet(path: Path) -> None:
    """Draws SegNet: every layer a slab as high as its feature maps and as thick as they are many.

    Args:
        path: PNG to write.
    """
    image, mask = sample()
    model = build_segnet(SIZE, NETWORK_SIZE, image.mean(axis=(0, 1)), image.std(axis=(0, 1)))
    drawn = list(slabs(model))
    figure, axis = canvas(13.4, 4.7)
    middle, side = 2.3, SIZE * PIXEL
    picture(axis, image, 0.15, middle, side, f"photograph\n{SIZE}×{SIZE} RGB")
    x = start = 0.15 + side
    spans: dict[str, list[float]] = {}
    for pixels, group in groupby(drawn, key=lambda slab: slab.side):
        arrow(axis, (x + 0.07, middle), (x + 0.34, middle))
        left = x = x + 0.4
        channels = []
        for slab in group:
            spans.setdefault(re.sub(r"\d.*", "", slab.name), []).extend((x, x := solid(axis, slab, x, middle)))
            channels.append(slab.channels)
            if slab.colour == GREY:
                across, up = (share * pixels * PIXEL for share in DEPTH)
                write(axis, x + across / 2, middle + pixels * PIXEL / 2 + up + 0.16, slab.name)
            x += 0.04
        text = f"{pixels} px\n{mode(channels)} filters"
        if len(channels) > 1 or pixels < NETWORK_SIZE:
            write(axis, (left + x) / 2, middle - pixels * PIXEL / 2 - 0.12, text, va="top")
        x += DEPTH[0] * pixels * PIXEL
    for name in ("encoder", "decoder"):
        bracket(axis, min(spans[name]), max(spans[name]), 3.75, name)
    panel(axis, start + 0.22, x + 0.18, 0.75, 4.6, f"SegNet, {model.count_params():,} parameters")
    arrow(axis, (x + 0.07, middle), (x + 0.34, middle))
    picture(axis, mask, x + 0.4, middle, side, f"mask\n{SIZE}×{SIZE}")
    handles = [Patch(color=colour, label=text) for text, colour in {s.meaning: s.colour for s in drawn}.items()]
    axis.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=SMALL)
    figure.set_size_inches(x + 0.55 + side, 4.7)
    axis.set_xlim(0, x + 0.55 + side)
    plots.save(figure, path)
