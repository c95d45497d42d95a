"""Diagrams of the two networks for the documentation, drawn from the Keras models.

    python -m tools.schematics [--graphics graphics]

writes segnet_schematic.png and densenet_flow.png. Sides, channels and parameter counts are read from the layers. The
image and its mask are synthetic; the mask is not a network's prediction.
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
from melanoma.cli import flags
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

SIZE, INPUT_SIZE = 256, 192  # sides in pixels: defaults of steps 1 and 2
BACKBONE, ROI = "densenet121", "crop"  # defaults of steps 4 and 3
SEED = 26  # of the synthetic image: an irregular lesion of several colours that does not touch the frame

BLUE, RED, GREEN = plots.LINES[:3]
YELLOW, GREY, PURPLE, INK = "#e9a820", "#8d99a6", "#6f5aa8", "#20262d"
LARGE, MEDIUM, SMALL = 17, 14, 13.5  # points; a page shows the figures at less than half their size

# All lengths below, and all coordinates, are inches in the figure.
PIXEL = 2.05 / SIZE  # length per pixel of a feature map's side
FILTER, MIN_THICKNESS = 0.0032, 0.05  # thickness of a slab per filter; smallest thickness
DEPTH = (0.20, 0.13)  # offset of a slab's back, right and up, as fractions of its height
GAP, STEP_WIDTH, LAYER = 0.4, 0.68, 0.092  # between steps; width of a step; width per layer of a dense block


@dataclass(frozen=True)
class Slab:
    """One layer of SegNet."""

    name: str
    side: int  # of its feature maps, in pixels
    channels: int
    colour: str
    meaning: str  # for the legend


@dataclass(frozen=True)
class Step:
    """One step of the classifier."""

    part: str  # name of the model it belongs to
    text: str
    shape: tuple[int, ...]  # of its output, without the batch
    colour: str
    count: int = 0  # layers of a dense block; 0 for other steps

    @property
    def width(self) -> float:
        """Width in inches; that of a dense block grows with its layers."""
        return max(1.45, (self.count + 3) * LAYER) if self.count else STEP_WIDTH

    @property
    def height(self) -> float:
        """Height in inches: proportional to the logarithm of the side, so that every halving looks the same."""
        return 1.6 + 0.13 * log2(self.shape[0]) if len(self.shape) == 3 else 2.38


def times(*lengths: int) -> str:
    """Joins lengths with multiplication signs."""
    return "\N{MULTIPLICATION SIGN}".join(map(str, lengths))


def shade(colour: str, amount: float) -> tuple[float, ...]:
    """Mixes a colour with white (amount in (0, 1]) or black (amount in [-1, 0))."""
    return tuple((1 - abs(amount)) * value + max(amount, 0) for value in to_rgb(colour))


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure with coordinates in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    return figure, axis


def write(axis: Axes, x: float, y: float, text: str, size: float = SMALL, **options: Any) -> None:
    """Writes text, by default centred on (x, y)."""
    axis.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "color": INK, **options})


def arrow(axis: Axes, *points: tuple[float, float]) -> None:
    """Draws an arrow through the points, with its head at the last."""
    axis.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1.6)
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.6, "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", points[-1], points[-2], arrowprops=style)


def show_image(axis: Axes, image: np.ndarray, left: float, middle: float, side: float, title: str) -> None:
    """Draws an image or a mask with a title below; `middle` is the y of its centre."""
    bottom = middle - side / 2
    axis.imshow(image, extent=(left, left + side, bottom, bottom + side), aspect="auto", cmap="gray")
    axis.add_patch(Rectangle((left, bottom), side, side, fill=False, color=INK))
    write(axis, left + side / 2, bottom - 0.12, title, MEDIUM, va="top")


def rounded_box(axis: Axes, left: float, bottom: float, width: float, height: float, **colours: Any) -> None:
    """Draws a rectangle with rounded corners."""
    style = "round,pad=0,rounding_size=0.09"
    axis.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, linewidth=1.6, **colours))


def bracket(axis: Axes, left: float, right: float, y: float, text: str) -> None:
    """Draws a bracket with a label above a part of a network."""
    axis.plot([left, left, right, right], [y - 0.1, y, y, y - 0.1], color=INK, linewidth=1.2)
    write(axis, (left + right) / 2, y + 0.22, text, LARGE)


def sample() -> tuple[np.ndarray, np.ndarray]:
    """A synthetic image, uint8 (SIZE, SIZE, 3), and its mask, uint8 (SIZE, SIZE, 1)."""
    image, mask = synthetic.generate(MELANOMA, (SIZE, SIZE), np.random.default_rng(SEED))
    return image, mask[..., None]


def style(layer: keras.Layer) -> tuple[str, str] | None:
    """Colour and meaning of a layer of SegNet; None for layers that are drawn with the convolution before them."""
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


def list_slabs(model: keras.Model) -> Iterator[Slab]:
    """The layers of SegNet that are drawn."""
    for layer in model.layers:
        if found := style(layer):
            side, channels = layer.output.shape[2:]
            yield Slab(layer.name, side, channels, *found)


def draw_slab(axis: Axes, slab: Slab, left: float, middle: float) -> float:
    """Draws a slab in oblique projection, seen from the upper right; returns the right end of its front."""
    right, height = left + max(MIN_THICKNESS, slab.channels * FILTER), slab.side * PIXEL
    bottom, top = middle - height / 2, middle + height / 2
    x, y = (fraction * height for fraction in DEPTH)
    front = [(left, bottom), (right, bottom), (right, top), (left, top)]
    upper = [(left, top), (right, top), (right + x, top + y), (left + x, top + y)]
    flank = [(right, bottom), (right + x, bottom + y), (right + x, top + y), (right, top)]
    for points, light in ((front, 0), (upper, 0.45), (flank, -0.25)):
        axis.add_patch(Polygon(points, facecolor=shade(slab.colour, light), edgecolor="white", linewidth=0.8, zorder=3))
    if slab.colour == GREY:
        write(axis, right + x / 2, top + y + 0.16, slab.name.partition("_")[0])
    return right


def draw_slabs(axis: Axes, slabs: list[Slab], end: float, middle: float) -> float:
    """Draws slabs to the right of `end`, grouped by their side in pixels, with brackets; returns their right end."""
    spans: dict[str, list[float]] = {"encoder": [], "decoder": []}
    x = end + 0.2
    for side, group in groupby(slabs, key=lambda slab: slab.side):
        arrow(axis, (end + 0.07, middle), (x + 0.34, middle))
        left = x = x + 0.4
        members = list(group)
        for slab in members:
            start, x = x, draw_slab(axis, slab, x, middle)
            for name in spans:
                spans[name] += (start, x) if slab.name.startswith(name) else ()
            x += 0.04
        if side != SIZE:  # that one is written under image and mask
            text = f"{side} px\n{mode(slab.channels for slab in members)} filters"
            write(axis, (left + x) / 2, middle - side * PIXEL / 2 - 0.12, text, va="top")
        x = end = x + DEPTH[0] * side * PIXEL
    for name in ("encoder", "decoder"):
        bracket(axis, min(spans[name]), max(spans[name]), middle + 1.54, name)
    return end


def draw_segnet(path: Path) -> None:
    """Draws SegNet: every layer a slab, its height the side of the feature maps, its thickness their number.

    Args:
        path: PNG to write.
    """
    image, mask = sample()
    mean, std = image.mean(axis=(0, 1)).tolist(), image.std(axis=(0, 1)).tolist()
    model = segmentation.build(segmentation.Design("segnet", INPUT_SIZE, mean=mean, std=std), SIZE)
    figure, axis = canvas(14.52, 4.9)
    middle, side = 2.3, SIZE * PIXEL
    show_image(axis, image, 0.15, middle, side, f"image\n{times(*model.input_shape[1:3])} RGB")
    left, slabs = 0.15 + side, list(list_slabs(model))
    right = draw_slabs(axis, slabs, left, middle)
    rounded_box(axis, left + 0.2, 0.72, right - left + 0.04, 4.11, facecolor="#f3f5f8", edgecolor="#d5dae1")
    write(axis, (left + right) / 2 + 0.22, 4.57, f"SegNet, {model.count_params():,} parameters", LARGE)
    arrow(axis, (right + 0.07, middle), (right + 0.39, middle))
    show_image(axis, mask, right + 0.45, middle, side, f"mask\n{times(*model.output_shape[1:3])}")
    handles = [Patch(color=colour, label=text) for text, colour in {s.meaning: s.colour for s in slabs}.items()]
    axis.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=SMALL)
    plots.save(figure, path)


def list_steps(model: keras.Model) -> Iterator[Step]:
    """The steps of a DenseNet or of a head, in order."""
    blocks: dict[str, int] = {}  # number of layers by name of the dense block
    for layer in model.layers:
        shape = layer.output.shape[1:]
        match layer:
            case layers.Conv2D() if layer.strides[0] > 1:  # only the first one
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
    """Draws the layers of a dense block as bars, and arcs between at most 8 of them."""
    places = left + (step.width - (step.count - 1) * LAYER) / 2 + LAYER * np.arange(step.count)
    for place in places:
        axis.add_patch(Rectangle((place - 0.022, bottom), 0.044, 0.25, color=step.colour, linewidth=0))
    chosen = np.linspace(0, step.count - 1, min(step.count, 8)).round().astype(int)
    for start, end in combinations(places[chosen], 2):
        size = end - start, 1.2 * ((end - start) / (places[-1] - places[0])) ** 0.8
        axis.add_patch(Arc(((start + end) / 2, bottom + 0.25), *size, theta2=180, color=step.colour, linewidth=0.7))


def draw_steps(axis: Axes, members: list[Step], x: float, middle: float) -> dict[str, tuple[float, float]]:
    """Draws a row of steps with arrows between them, starting at x; returns left and right end of each part."""
    spans: dict[str, tuple[float, float]] = {}
    for step in members:
        bottom, centre = middle - step.height / 2, x + step.width / 2
        rounded_box(axis, x, bottom, step.width, step.height, facecolor=shade(step.colour, 0.82), edgecolor=step.colour)
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


def draw_classifier(path: Path) -> None:
    """Draws the classifier: blocks and transitions of DenseNet121, then the head, with the shape after each step.

    Args:
        path: PNG to write.
    """
    network = classifier.build(BACKBONE, SIZE, backbones.NONE)
    backbone, head, model = network.backbone, network.head, network.model
    steps = [Step("", "preprocessing", model.input_shape[1:], GREY), *list_steps(backbone), *list_steps(head)]
    figure, axis = canvas(12.2, 7.36)
    upper, lower, turn = 5.48, 1.95, 3.89  # heights of the two rows and of the line from one to the other
    image, mask = sample()
    show_image(axis, roi.region_of_interest(image, mask, ROI)[0], 0.15, upper, 2.4, "region of interest")
    arrow(axis, (2.6, upper), (2.9, upper))
    name, half = backbones.applications()[BACKBONE].build.__name__, len(steps) // 2
    span = draw_steps(axis, steps[:half], 2.95, upper)[backbone.name]
    bracket(axis, *span, upper + 1.42, f"{name}, {backbone.count_params():,} parameters")
    x = span[1]
    arrow(axis, (x, upper), (x + 0.3, upper), (x + 0.3, turn), (0.15, turn), (0.15, lower), (0.45, lower))
    spans = draw_steps(axis, steps[half:], 0.5, lower)
    bracket(axis, *spans[backbone.name], lower + 1.36, f"{name}, continued")
    bracket(axis, *spans[head.name], lower + 1.36, f"head, {head.count_params():,} parameters")
    x = spans[head.name][1]
    for label, y in zip(CLASSES, (lower + 0.75, lower, lower - 0.75), strict=True):
        arrow(axis, (x + 0.05, y), (x + GAP - 0.05, y))
        write(axis, x + GAP + 0.04, y, label.replace(" ", "\n"), ha="left")
    text = f"Dense block: every layer reads all layers before it. Transition: conv {times(1, 1)}, average pooling."
    write(axis, 6.1, 0.36, f"{text}\n{model.count_params():,} parameters in total.", linespacing=1.35)
    plots.save(figure, path)


def main() -> None:
    """Draws both diagrams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--graphics", type=Path, default=Path("graphics"), help="folder to write")
    graphics = parser.parse_args().graphics
    draw_segnet(graphics / "segnet_schematic.png")
    draw_classifier(graphics / "densenet_flow.png")


if __name__ == "__main__":
    main()
