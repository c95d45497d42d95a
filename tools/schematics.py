"""Schematics of the two networks for the README, drawn from the Keras models themselves.

    python -m melanoma.schematics [--graphics graphics]

writes segnet_schematic.png and densenet_flow.png. Sides, channels, counts and parameters are read from the layers; the
photograph is a drawn phantom, its mask the drawn one and no network's answer.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, groupby
from math import log2
from pathlib import Path
from statistics import mode
from typing import Any

from melanoma.classes import CLASSES, MELANOMA
from melanoma.dataset import roi
from melanoma.evaluation import plots
from melanoma.models import backbones, classifier, segmentation
from melanoma.sources import synthetic

import keras
import numpy as np
from keras import layers
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyBboxPatch, Patch, Polygon, Rectangle

SIZE, INPUT_SIZE = 256, 192  # sides in pixels, the defaults of the scripts
BACKBONE = "densenet121"
SEED = 26  # the phantom: an irregular lesion of several browns, clear of the frame

BLUE, RED, GREEN = plots.LINES
YELLOW, GREY, PURPLE, INK = "#e9a820", "#8d99a6", "#6f5aa8", "#20262d"
LARGE, MEDIUM, SMALL = 17, 14, 13.5  # points; a README shows the figures at less than half their size

# All lengths below, and all coordinates, are inches of the figure.
PIXEL = 2.05 / SIZE  # a pixel of a feature map's side
FILTER, THINNEST = 0.0032, 0.05  # a filter of a slab's thickness; a slab of few filters
DEPTH = (0.20, 0.13)  # a slab's third dimension, right and up, as shares of its height
GAP, STEP_WIDTH, LAYER = 0.4, 0.68, 0.092  # between steps; a step; a layer of a dense block


@dataclass(frozen=True)
class Slab:
    """One layer of SegNet: its feature maps' side and number, and how it is drawn."""

    name: str
    side: int
    channels: int
    colour: str
    meaning: str


@dataclass(frozen=True)
class Step:
    """One step of the classifier."""

    part: str  # the model it belongs to
    text: str
    shape: tuple[int, ...]
    colour: str
    count: int = 0  # layers of a dense block

    @property
    def width(self) -> float:
        """A dense block grows with its layers."""
        return max(1.45, (self.count + 3) * LAYER) if self.count else STEP_WIDTH

    @property
    def height(self) -> float:
        """Falls with the side's logarithm, for halving it to look the same everywhere."""
        return 1.6 + 0.13 * log2(self.shape[0]) if len(self.shape) == 3 else 2.38


def times(*lengths: int) -> str:
    """Lengths as a shape, e.g. 64, 64, 256 with multiplication signs between."""
    return "\N{MULTIPLICATION SIGN}".join(map(str, lengths))


def shade(colour: str, share: float) -> tuple[float, ...]:
    """Mixes a colour with white (share above 0) or black (below)."""
    return tuple((1 - abs(share)) * value + max(share, 0) for value in to_rgb(colour))


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure whose coordinates are inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    return figure, axis


def write(axis: Axes, x: float, y: float, text: str, size: float = SMALL, **options: Any) -> None:
    """Writes a text, centred on (x, y) unless `options` say otherwise."""
    axis.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "color": INK, **options})


def arrow(axis: Axes, *points: tuple[float, float]) -> None:
    """Draws an arrow along points to the last."""
    axis.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1.6)
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.6, "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", points[-1], points[-2], arrowprops=style)


def picture(axis: Axes, image: np.ndarray, left: float, middle: float, side: float, title: str) -> None:
    """Shows a photograph or a mask, with a title under it."""
    bottom = middle - side / 2
    axis.imshow(image, extent=(left, left + side, bottom, bottom + side), aspect="auto", cmap="gray")
    axis.add_patch(Rectangle((left, bottom), side, side, fill=False, color=INK))
    write(axis, left + side / 2, bottom - 0.12, title, MEDIUM, va="top")


def card(axis: Axes, left: float, bottom: float, width: float, height: float, **colours: Any) -> None:
    """Draws a rectangle with round corners."""
    style = "round,pad=0,rounding_size=0.09"
    axis.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, linewidth=1.6, **colours))


def bracket(axis: Axes, left: float, right: float, y: float, text: str) -> None:
    """Draws a bracket over a part of a network, with its name."""
    axis.plot([left, left, right, right], [y - 0.1, y, y, y - 0.1], color=INK, linewidth=1.2)
    write(axis, (left + right) / 2, y + 0.22, text, LARGE)


def sample() -> tuple[np.ndarray, np.ndarray]:
    """The phantom: uint8 (SIZE, SIZE, 3) and its mask (SIZE, SIZE, 1)."""
    image, mask = synthetic.draw(MELANOMA, (SIZE, SIZE), np.random.default_rng(SEED))
    return image, mask[..., None]


def meaning(layer: keras.Layer) -> tuple[str, str] | None:
    """Colour and legend of a layer of SegNet; None for those that are drawn with the convolution before them."""
    match layer:
        case layers.Normalization() | layers.Resizing():
            return GREY, "standardise, resize"
        case layers.Conv2D():
            conv = f"conv {times(*layer.kernel_size)}"
            if layer.activation is keras.activations.sigmoid:
                return YELLOW, f"{conv} + sigmoid"
            return BLUE, f"{conv} + batch norm + ReLU"
        case layers.MaxPooling2D():
            return GREEN, f"max pooling {times(*layer.pool_size)}"
        case layers.UpSampling2D():
            return RED, f"upsampling {times(*layer.size)}"
    return None


def slabs(model: keras.Model) -> Iterator[Slab]:
    """The layers of SegNet that are drawn."""
    for layer in model.layers:
        if kind := meaning(layer):
            side, channels = layer.output.shape[2:]
            yield Slab(layer.name, side, channels, *kind)


def solid(axis: Axes, slab: Slab, left: float, middle: float) -> float:
    """Draws a slab in oblique projection, seen from the upper right; returns the x where its front ends."""
    right, height = left + max(THINNEST, slab.channels * FILTER), slab.side * PIXEL
    bottom, top = middle - height / 2, middle + height / 2
    x, y = (share * height for share in DEPTH)
    front = [(left, bottom), (right, bottom), (right, top), (left, top)]
    roof = [(left, top), (right, top), (right + x, top + y), (left + x, top + y)]
    flank = [(right, bottom), (right + x, bottom + y), (right + x, top + y), (right, top)]
    for points, share in ((front, 0), (roof, 0.45), (flank, -0.25)):
        axis.add_patch(Polygon(points, facecolor=shade(slab.colour, share), edgecolor="white", linewidth=0.8, zorder=3))
    if slab.colour == GREY:
        write(axis, right + x / 2, top + y + 0.16, slab.name)
    return right


def stages(axis: Axes, drawn: list[Slab], end: float, middle: float) -> float:
    """Draws all slabs right of `end`, one group for each side in pixels, and brackets; returns where the last ends."""
    spans: dict[str, list[float]] = {"encoder": [], "decoder": []}
    x = end + 0.2
    for side, group in groupby(drawn, key=lambda slab: slab.side):
        arrow(axis, (end + 0.07, middle), (x + 0.34, middle))
        left = x = x + 0.4
        members = list(group)
        for slab in members:
            start, x = x, solid(axis, slab, x, middle)
            for name in spans:
                spans[name] += (start, x) if slab.name.startswith(name) else ()
            x += 0.04
        if side != SIZE:  # the photograph and the mask tell that one
            text = f"{side} px\n{mode(slab.channels for slab in members)} filters"
            write(axis, (left + x) / 2, middle - side * PIXEL / 2 - 0.12, text, va="top")
        x = end = x + DEPTH[0] * side * PIXEL
    for name in ("encoder", "decoder"):
        bracket(axis, min(spans[name]), max(spans[name]), middle + 1.54, name)
    return end


def segnet(path: Path) -> None:
    """Draws SegNet: every layer a slab, as high as its feature maps and as thick as they are many.

    Args:
        path: PNG to write.
    """
    image, mask = sample()
    mean, std = image.mean(axis=(0, 1)).tolist(), image.std(axis=(0, 1)).tolist()
    model = segmentation.build(segmentation.Design("segnet", INPUT_SIZE, mean=mean, std=std), SIZE)
    figure, axis = canvas(14.52, 4.9)
    middle, side = 2.3, SIZE * PIXEL
    picture(axis, image, 0.15, middle, side, f"photograph\n{times(*model.input_shape[1:3])} RGB")
    left, drawn = 0.15 + side, list(slabs(model))
    right = stages(axis, drawn, left, middle)
    card(axis, left + 0.2, 0.72, right - left + 0.04, 4.11, facecolor="#f3f5f8", edgecolor="#d5dae1")
    write(axis, (left + right) / 2 + 0.22, 4.57, f"SegNet, {model.count_params():,} parameters", LARGE)
    arrow(axis, (right + 0.07, middle), (right + 0.39, middle))
    picture(axis, mask, right + 0.45, middle, side, f"mask\n{times(*model.output_shape[1:3])}")
    handles = [Patch(color=colour, label=text) for text, colour in {s.meaning: s.colour for s in drawn}.items()]
    axis.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=SMALL)
    plots.save(figure, path)


def steps(model: keras.Model) -> Iterator[Step]:
    """The steps of a DenseNet or of a head, in order."""
    blocks: dict[str, int] = {}  # layers by block
    for layer in model.layers:
        shape = layer.output.shape[1:]
        match layer:
            case layers.Conv2D() if layer.strides[0] > 1:  # of all convolutions only the stem's
                text = f"conv {times(*layer.kernel_size)}, stride {layer.strides[0]}"
                yield Step(model.name, text, shape, BLUE)
            case layers.MaxPooling2D():
                text = f"max pool {times(*layer.pool_size)}, stride {layer.strides[0]}"
                yield Step(model.name, text, shape, GREEN)
            case layers.Concatenate():
                name = layer.name.split("_")[0]
                blocks[name] = blocks.get(name, 0) + 1
                block = Step(model.name, f"dense block {len(blocks)}", shape, PURPLE, blocks[name])
            case layers.AveragePooling2D():
                yield from (block, Step(model.name, "transition", shape, RED))
            case layers.GlobalAveragePooling2D():
                yield from (block, Step(model.name, "global average pooling", shape, GREEN))
            case layers.Dense():
                activation = layer.activation.__name__.replace("relu", "ReLU")
                yield Step(model.name, f"dense, {activation}", shape, YELLOW)
            case layers.Dropout():
                yield Step(model.name, f"dropout {layer.rate:g}", shape, GREY)


def connections(axis: Axes, step: Step, left: float, bottom: float) -> None:
    """Draws a dense block's layers as bars, and arcs between some of them for those between all."""
    places = left + (step.width - (step.count - 1) * LAYER) / 2 + LAYER * np.arange(step.count)
    for place in places:
        axis.add_patch(Rectangle((place - 0.022, bottom), 0.044, 0.25, color=step.colour, linewidth=0))
    chosen = np.linspace(0, step.count - 1, min(step.count, 8)).round().astype(int)
    for start, end in combinations(places[chosen], 2):
        size = end - start, 1.2 * ((end - start) / (places[-1] - places[0])) ** 0.8
        axis.add_patch(Arc(((start + end) / 2, bottom + 0.25), *size, theta2=180, color=step.colour, linewidth=0.7))


def row(axis: Axes, members: list[Step], x: float, middle: float) -> dict[str, tuple[float, float]]:
    """Draws steps and the arrows between them from x on; returns where each part begins and ends."""
    spans: dict[str, tuple[float, float]] = {}
    for step in members:
        bottom, centre = middle - step.height / 2, x + step.width / 2
        card(axis, x, bottom, step.width, step.height, facecolor=shade(step.colour, 0.82), edgecolor=step.colour)
        if step.count:
            write(axis, centre, bottom + step.height - 0.2, step.text)
            connections(axis, step, x, bottom + 0.65)
            write(axis, centre, bottom + 0.33, f"{step.count} layers\n{times(*step.shape)}")
        else:
            write(axis, centre, middle, f"{step.text}\n{times(*step.shape)}", rotation=90, linespacing=1.3)
        spans[step.part] = spans.get(step.part, (x, 0))[0], x + step.width
        x += step.width + GAP
        if step is not members[-1]:
            arrow(axis, (x - GAP + 0.05, middle), (x - 0.05, middle))
    return spans


def densenet(path: Path) -> None:
    """Draws the classifier: DenseNet's blocks and transitions, then the head, with the shape after each step.

    Args:
        path: PNG to write.
    """
    network = classifier.build(BACKBONE, SIZE, backbones.NONE)
    backbone, head, model = network.backbone, network.head, network.model
    drawn = [Step("", "preprocessing", model.input_shape[1:], GREY), *steps(backbone), *steps(head)]
    figure, axis = canvas(12.2, 7.36)
    upper, lower, turn = 5.48, 1.95, 3.89  # heights of the two rows and of the line from one to the other
    image, mask = sample()
    picture(axis, roi.region_of_interest(image, mask, "mask")[0], 0.15, upper, 2.4, "masked photograph")
    arrow(axis, (2.6, upper), (2.9, upper))
    name, half = backbones.applications()[BACKBONE].build.__name__, len(drawn) // 2
    span = row(axis, drawn[:half], 2.95, upper)[backbone.name]
    bracket(axis, *span, upper + 1.42, f"{name}, {backbone.count_params():,} parameters")
    x = span[1]
    arrow(axis, (x, upper), (x + 0.3, upper), (x + 0.3, turn), (0.15, turn), (0.15, lower), (0.45, lower))
    spans = row(axis, drawn[half:], 0.5, lower)
    bracket(axis, *spans[backbone.name], lower + 1.36, f"{name}, continued")
    bracket(axis, *spans[head.name], lower + 1.36, f"head, {head.count_params():,} parameters")
    x = spans[head.name][1]
    for label, y in zip(CLASSES, (lower + 0.75, lower, lower - 0.75), strict=True):
        arrow(axis, (x + 0.05, y), (x + GAP - 0.05, y))
        write(axis, x + GAP + 0.04, y, label.replace(" ", "\n"), ha="left")
    text = f"Dense block: every layer reads all before it. Transition: conv {times(1, 1)} and average pooling."
    write(axis, 6.1, 0.36, f"{text}\nTogether {model.count_params():,} parameters.", linespacing=1.35)
    plots.save(figure, path)


def main() -> None:
    """Draws both figures."""
    parser = argparse.ArgumentParser(
        prog="python -m melanoma.schematics", description="Draw the two networks for the README.", allow_abbrev=False
    )
    parser.add_argument("--graphics", type=Path, default=Path("graphics"), help="folder to write, default %(default)s")
    folder = parser.parse_args().graphics
    segnet(folder / "segnet_schematic.png")
    densenet(folder / "densenet_flow.png")


if __name__ == "__main__":
    main()
