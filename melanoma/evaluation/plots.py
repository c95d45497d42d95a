"""Every kind of plot, drawn from arrays and saved as PNG."""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from melanoma.artifacts.atomic import atomic_write
from melanoma.metrics.segmentation import JACCARD_THRESHOLD

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator
from scipy import stats

matplotlib.rcParams["text.parse_math"] = False  # $ in ids and file names does not start a formula

DPI = 150
GRID_DPI = 120  # about one pixel per pixel of a 256-pixel image
TRUTH, PREDICTION = "#00e5ff", "#ffd400"  # cyan and yellow differ from skin, and from each other in grey scale
# Blue, red, green, purple, ochre; the first three are also distinct with red-green colour blindness.
LINES = ("#1b6ca8", "#d1495b", "#3a7d44", "#8a5a9e", "#b8860b")
SMALLEST_AREA = 0.001  # fraction of the image; the left end of the axis of lesion areas
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "D", "s", "^")  # of operating points


@dataclass(frozen=True)
class Tile:
    """One image of a grid, with optional overlays."""

    image: np.ndarray  # uint8 (S, S, 3), or a mask (S, S, 1) of {0, 1}
    title: str = ""
    truth: np.ndarray | None = None  # mask (S, S, 1), drawn as a contour
    prediction: np.ndarray | None = None  # mask (S, S, 1), drawn as a contour
    heatmap: np.ndarray | None = None  # float (h, w) in [0, 1], stretched over the image


@dataclass(frozen=True)
class Curve:
    """A curve in the unit square, with the operating points on it."""

    panel: str  # title of the panel that it is drawn in; "": the figure has one panel without title
    label: str
    x: np.ndarray
    y: np.ndarray
    points: Sequence[tuple[float, float]] = ()
    band: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # x, lower y, upper y
    colour: int = 0  # index into LINES, modulo their number
    style: int = 0  # index into STYLES, modulo their number


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Writes a figure as PNG; creates the folder if needed."""
    for text in figure.findobj(Text):
        if not (content := text.get_text()).isascii():  # Matplotlib cannot draw bytes of a name that are not UTF-8
            text.set_text(content.encode(errors="backslashreplace").decode())
    with atomic_write(path) as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
        figure.savefig(stream, dpi=dpi, format="png")


def image_grid(path: Path, rows: Sequence[Sequence[Tile]], title: str) -> None:
    """Draws images in rows and columns, with contours of masks: truth cyan, prediction yellow."""
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.1 * columns, 2.3 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
        axis.set(xticks=[], yticks=[])  # otherwise the layout reserves space for the ticks
    for line, row in zip(axes, rows, strict=True):
        for axis, tile in zip(line, row, strict=False):
            axis.imshow(tile.image, cmap="gray", vmin=0, vmax=1 if tile.image.shape[-1] == 1 else 255)
            axis.set_title(tile.title, fontsize=7.5)
            if tile.heatmap is not None:
                side = tile.image.shape[0]
                extent = (-0.5, side - 0.5, side - 0.5, -0.5)
                axis.imshow(tile.heatmap, cmap="inferno", alpha=0.5, extent=extent, interpolation="bilinear")
            for mask, colour in ((tile.truth, TRUTH), (tile.prediction, PREDICTION)):
                if mask is not None and 0 < mask.sum() < mask.size:
                    axis.contour(mask[..., 0], levels=[0.5], colors=colour, linewidths=1.0)
    save(figure, path, GRID_DPI)


def training_curves(
    path: Path, names: dict[str, str], title: str, history: dict[str, list[float]], kept_epoch: int
) -> None:
    """Draws training and validation curves, one panel per quantity, with the epoch marked whose weights are kept.

    Args:
        path: PNG to write.
        names: {quantity: axis label}.
        title: title of the figure.
        history: {quantity: value of each epoch}; validation values have the prefix val_.
        kept_epoch: the epoch whose weights were kept, counted from 1; 0 if none was.
    """
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis, (quantity, label) in zip(figure.subplots(1, len(names), squeeze=False)[0], names.items(), strict=True):
        for key, name, colour in ((quantity, "train", LINES[0]), (f"val_{quantity}", "validation", LINES[1])):
            if key in history:
                epochs = range(1, len(history[key]) + 1)
                axis.plot(epochs, history[key], color=colour, label=name, marker="o", markersize=3)
        if kept_epoch:
            axis.axvline(kept_epoch, color="0.6", linestyle=":", label=f"weights kept: epoch {kept_epoch}")
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    save(figure, path)


def jaccard(path: Path, area: np.ndarray, values: np.ndarray, groups: dict[str, np.ndarray], title: str) -> None:
    """Draws the Jaccard index of each image against the size of its lesion, and its distribution in each group.

    Args:
        path: PNG to write.
        area: float (N,), fraction of the image that is lesion; an empty mask is drawn at SMALLEST_AREA.
        values: float (N,), Jaccard index.
        groups: {name: bool (N,)}; at most four.
        title: title of the figure.
    """
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for position, ((name, rows), colour) in enumerate(zip(groups.items(), LINES, strict=False)):
        left.scatter(
            100 * np.maximum(area[rows], SMALLEST_AREA),
            values[rows],
            s=14,
            color=colour,
            alpha=0.75,
            linewidths=0,
            label=name,
        )
        right.boxplot(
            values[rows],
            positions=[position],
            widths=0.55,
            showmeans=True,
            medianprops={"color": colour, "linewidth": 2},
            meanprops={"marker": "D", "markerfacecolor": colour, "markeredgecolor": "white", "markersize": 6},
            flierprops={"marker": ".", "markeredgecolor": colour},
        )
    left.set_xscale("log")
    left.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]))
    left.xaxis.set_major_formatter("{x:g} %")
    left.minorticks_off()
    left.set(xlabel="lesion area, % of the image", ylabel="Jaccard index", ylim=(-0.02, 1.02))
    left.legend(fontsize=8, loc="lower right")
    two_lines = {name: name.replace(" ", "\n") if " " in name else f"{name}\n" for name in groups}  # aligns the counts
    labels = [f"{two_lines[name]}\nn = {rows.sum()}\nmean {values[rows].mean():.3f}" for name, rows in groups.items()]
    right.set_xticks(range(len(labels)), labels, fontsize=8)
    right.set_xlabel("line: median, diamond: mean, box: quartiles", fontsize=8)
    for axis in (left, right):
        axis.axhline(JACCARD_THRESHOLD, color="0.6", linestyle=":", linewidth=1)
        axis.grid(alpha=0.25)
    left.annotate(
        f"below {JACCARD_THRESHOLD}: failed",
        (0.99, JACCARD_THRESHOLD),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=7,
    )
    save(figure, path)


def plot_curves(
    path: Path,
    curves: Sequence[Curve],
    title: str,
    axes: tuple[str, str],
    diagonal: str = "",
    points: Sequence[str] = (),
) -> None:
    """Draws curves in the unit square, such as ROC or precision-recall curves.

    Args:
        path: PNG to write.
        curves: the curves, with their bands and points, at least one; one panel for each value of their `panel`.
        title: title of the figure.
        axes: labels of x and y.
        diagonal: label of the line from (0, 0) to (1, 1); "": no such line.
        points: labels of the curves' points, in their order, which is the same on all curves.
    """
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    figure = Figure(figsize=(5.4 * len(panels), 5.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        shown = [curve for curve in curves if curve.panel == panel]
        if diagonal:
            axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1, label=diagonal)
        for curve in shown:
            colour = LINES[curve.colour % len(LINES)]
            if curve.band:
                axis.fill_between(*curve.band, color=colour, alpha=0.15, linewidth=0)
            style = STYLES[curve.style % len(STYLES)]
            axis.plot(curve.x, curve.y, color=colour, linewidth=1.8, linestyle=style, label=legend_label(curve.label))
            for (x, y), marker in zip(curve.points, itertools.cycle(MARKERS), strict=False):
                axis.plot(x, y, marker=marker, color=colour, markeredgecolor="white", markersize=8)
        for label, marker in zip(points, itertools.cycle(MARKERS), strict=False):
            axis.plot([], [], marker=marker, color="0.4", linestyle="none", label=label)
        if any(curve.band for curve in shown):
            axis.fill_between([], [], [], color="0.4", alpha=0.2, label="95 % band")
        axis.set(xlabel=axes[0], ylabel=axes[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axis.set_title(panel, fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    save(figure, path)


def legend_label(text: str) -> str:
    """A label that a legend shows: Matplotlib leaves out those that begin with an underscore."""
    return f" {text}" if text.startswith("_") else text


def reliability(path: Path, classes: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], title: str) -> None:
    """Draws the observed frequency against the predicted probability, and the number of images in each bin.

    Args:
        path: PNG to write.
        classes: {name: (mean probability, observed frequency, number of images)}, each (bins,); at most three.
        title: title of the figure.
    """
    figure = Figure(figsize=(5.4, 6.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1, label="perfect calibration")
    for position, ((name, (predicted, observed, counts)), colour) in enumerate(
        zip(classes.items(), LINES, strict=False)
    ):
        errors = wilson_errors(observed, counts)
        upper.errorbar(predicted, observed, yerr=errors, color=colour, marker="o", markersize=5, capsize=2, label=name)
        lower.bar(predicted + 0.012 * (2 * position - len(classes) + 1), counts, width=0.022, color=colour)
    upper.set(ylabel="observed frequency", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    lower.set(xlabel="predicted probability, mean of each bin", ylabel="images", yscale="symlog")
    lower.yaxis.set_major_formatter("{x:g}")
    for axis in (upper, lower):
        axis.grid(alpha=0.25)
    upper.legend(fontsize=8)
    save(figure, path)


def wilson_errors(observed: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Lower and upper error bar of each fraction for a 95 % Wilson interval, float (2, N).

    Args:
        observed: float (N,), fractions.
        counts: int (N,), number of images behind each fraction.
    """
    bounds = [
        stats.binomtest(round(fraction * count), count).proportion_ci(0.95, "wilson")
        for fraction, count in zip(observed.tolist(), counts.tolist(), strict=True)
    ]
    low, high = np.transpose(bounds)
    return np.clip([observed - low, high - observed], 0, None)


def forest_plot(
    path: Path, groups: dict[str, dict[str, tuple[float, tuple[float, float]]]], label: str, chance: float, title: str
) -> None:
    """Draws values with their intervals, one line per name and group.

    Args:
        path: PNG to write.
        groups: {group: {name: (value, (low, high))}}; the same names in each of at most three groups.
        label: label of the value axis.
        chance: value at chance level, drawn as a dotted line.
        title: title of the figure.
    """
    names = list(next(iter(groups.values())))
    figure = Figure(figsize=(6.4, 1.4 + 0.5 * len(names)), layout="constrained")
    axis = figure.subplots()
    for position, ((group, values), colour) in enumerate(zip(groups.items(), LINES, strict=False)):
        for line, name in enumerate(names):
            value, (low, high) = values[name]
            height = line + 0.18 * (position - (len(groups) - 1) / 2)
            axis.plot([low, high], [height, height], color=colour, linewidth=2)
            axis.plot(value, height, "o", color=colour, label=group if line == 0 else None)
            axis.annotate(f"{value:.3f}", (high, height), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axis.axvline(chance, color="0.6", linestyle=":", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.set_title(title, fontsize=11)
    axis.margins(x=0.12)
    axis.grid(axis="x", alpha=0.25)
    axis.legend(fontsize=8, loc="upper left")
    save(figure, path)


def confusion(path: Path, matrix: np.ndarray, names: Sequence[str], title: str) -> None:
    """Draws a confusion matrix: counts and per cent of each row.

    Args:
        path: PNG to write.
        matrix: int (K, K), rows truth, columns prediction.
        names: names of the K classes.
        title: title of the figure.
    """
    fraction = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(4.8, 4.8), layout="constrained")
    axis = figure.subplots()
    axis.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        colour = "white" if fraction[row, column] > 0.55 else "black"
        text = f"{count}\n{100 * fraction[row, column]:.1f} %"
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=11)
    labels = [name.replace(" ", "\n") for name in names]
    axis.set_xticks(range(len(names)), labels, fontsize=9)
    axis.set_yticks(range(len(names)), labels, fontsize=9)
    axis.set(xlabel="predicted", ylabel="truth")
    figure.suptitle(title, fontsize=11)  # a title of the axes would be cut off
    save(figure, path)
