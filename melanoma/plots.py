"""Figures as PNG, drawn from arrays and saved numbers only."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from melanoma import stages

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

DPI = 150
SHEET_DPI = 120  # shows a 256-pixel photograph pixel by pixel in its tile
TRUTH, PREDICTION = "#00e5ff", "#ffd400"  # outlines: cyan and yellow stand out from skin, and from each other in grey
LINES = ("#1b6ca8", "#d1495b", "#3a7d44")  # blue, red, green; distinct for the commonest colour blindness too
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet, with what is drawn on it."""

    image: np.ndarray  # uint8 (S, S, 3), or (S, S, 1) of {0, 1} for a mask
    title: str = ""
    truth: np.ndarray | None = None  # masks (S, S, 1), outlined
    prediction: np.ndarray | None = None
    heat: np.ndarray | None = None  # (h, w), 0 to 1, laid over the picture


@dataclass(frozen=True)
class Curve:
    """A line through the unit square, and the points on it at chosen thresholds."""

    label: str
    x: np.ndarray
    y: np.ndarray
    points: Sequence[tuple[float, float]] = ()
    band: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # x, lower y, upper y
    colour: int = 0  # place in LINES
    style: int = 0  # place in STYLES


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Writes a figure as PNG, whole or not at all, and makes its folder where needed."""
    with stages.whole(path) as stream:
        figure.savefig(stream, dpi=dpi, format="png")


def sheet(path: Path, rows: Sequence[Sequence[Tile]], title: str) -> None:
    """Pictures in rows and columns, masks outlined: truth in cyan, prediction in yellow."""
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.1 * columns, 2.3 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
        axis.set(xticks=[], yticks=[])  # or the layout would lay them out all the same
    for line, row in zip(axes, rows, strict=True):
        for axis, tile in zip(line, row, strict=False):
            axis.imshow(tile.image, cmap="gray", vmin=0, vmax=1 if tile.image.shape[-1] == 1 else 255)
            axis.set_title(tile.title, fontsize=7.5)
            if tile.heat is not None:
                side = tile.image.shape[0]
                extent = (-0.5, side - 0.5, side - 0.5, -0.5)
                axis.imshow(tile.heat, cmap="inferno", alpha=0.5, extent=extent, interpolation="bilinear")
            for mask, colour in ((tile.truth, TRUTH), (tile.prediction, PREDICTION)):
                if mask is not None and 0 < mask.sum() < mask.size:
                    axis.contour(mask[..., 0], levels=[0.5], colors=colour, linewidths=1.0)
    save(figure, path, SHEET_DPI)


def training_curves(
    path: Path, names: dict[str, str], title: str, history: dict[str, list[float]], best_epoch: int
) -> None:
    """Training and validation curves over epochs, a panel for each quantity, the best epoch marked.

    Args:
        path: PNG to write.
        names: {quantity: label of its axis}.
        title: over the panels.
        history: values per epoch; a quantity `q` of validation is `val_q`.
        best_epoch: the one whose weights were kept, from 1; 0 where none was.
    """
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis, (quantity, label) in zip(figure.subplots(1, len(names), squeeze=False)[0], names.items(), strict=True):
        for key, name, colour in ((quantity, "train", LINES[0]), (f"val_{quantity}", "validation", LINES[1])):
            if key in history:
                epochs = range(1, len(history[key]) + 1)
                axis.plot(epochs, history[key], color=colour, label=name, marker="o", markersize=3)
        if best_epoch:
            axis.axvline(best_epoch, color="0.6", linestyle=":", label=f"best epoch, {best_epoch}")
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    save(figure, path)


def jaccard(
    path: Path, share: np.ndarray, values: np.ndarray, groups: dict[str, np.ndarray], failed: float, title: str
) -> None:
    """Jaccard index of each image against its lesion's size, and its spread in each group.

    Args:
        path: PNG to write.
        share: of the frame that is lesion, (N,), above 0.
        values: Jaccard index, (N,).
        groups: bool (N,) by name, at most three.
        failed: below which a mask counts as such.
        title: over the panels.
    """
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, ((name, rows), colour) in enumerate(zip(groups.items(), LINES, strict=False)):
        left.scatter(100 * share[rows], values[rows], s=14, color=colour, alpha=0.75, linewidths=0, label=name)
        right.boxplot(
            values[rows],
            positions=[place],
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
    left.set(xlabel="lesion's share of the frame", ylabel="Jaccard index", ylim=(-0.02, 1.02))
    left.legend(fontsize=8, loc="lower right")
    names = [name.replace(" ", "\n") for name in groups]
    counts = [f"n = {rows.sum()}\nmean {values[rows].mean():.3f}" for rows in groups.values()]
    right.set_xticks(range(len(names)), map("\n".join, zip(names, counts, strict=True)), fontsize=8)
    right.set_xlabel("line: median, diamond: mean, box: quartiles", fontsize=8)
    for axis in (left, right):
        axis.axhline(failed, color="0.6", linestyle=":", linewidth=1)
        axis.grid(alpha=0.25)
    left.annotate(
        f"below {failed}: failed",
        (0.99, failed),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=7,
    )
    save(figure, path)


def unit_square(
    path: Path, curves: Sequence[Curve], title: str, axes: tuple[str, str], diagonal: str = "", points: str = ""
) -> None:
    """Curves between 0 and 1: ROC, precision and recall, calibration.

    Args:
        path: PNG to write.
        curves: with their bands and points.
        title: over the curves.
        axes: labels of x and y.
        diagonal: what the line from (0, 0) to (1, 1) means; "": there is none.
        points: what those of the curves are.
    """
    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    axis = figure.subplots()
    if diagonal:
        axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1, label=diagonal)
    for curve in curves:
        colour = LINES[curve.colour]
        if curve.band:
            axis.fill_between(*curve.band, color=colour, alpha=0.15, linewidth=0)
        style = STYLES[curve.style % len(STYLES)]
        axis.plot(curve.x, curve.y, color=colour, linewidth=1.8, linestyle=style, label=curve.label)
        for x, y in curve.points:
            axis.plot(x, y, marker="o", color=colour, markeredgecolor="white", markersize=8)
    if points:
        axis.plot([], [], marker="o", color="0.4", linestyle="none", label=points)
    if any(curve.band for curve in curves):
        axis.fill_between([], [], [], color="0.4", alpha=0.2, label="95 % band")
    axis.set(xlabel=axes[0], ylabel=axes[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    save(figure, path)


def reliability(path: Path, classes: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], title: str) -> None:
    """What probabilities promise against what comes true, and how many images promise it.

    Args:
        path: PNG to write.
        classes: of each, mean probability, share that is of the class, and number of images of each bin; at most three.
        title: over the panels.
    """
    figure = Figure(figsize=(5.4, 6.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1, label="calibrated")
    for place, ((name, (promised, found, counts)), colour) in enumerate(zip(classes.items(), LINES, strict=False)):
        # Wilson's 95 % interval of a share: good for few images too.
        z = 1.96
        centre = (found + z**2 / (2 * counts)) / (1 + z**2 / counts)
        half = z / (1 + z**2 / counts) * np.sqrt(found * (1 - found) / counts + z**2 / (4 * counts**2))
        around = np.clip([found - centre + half, centre + half - found], 0, None)
        upper.errorbar(promised, found, yerr=around, color=colour, marker="o", markersize=5, capsize=2, label=name)
        lower.bar(promised + 0.012 * (2 * place - len(classes) + 1), counts, width=0.022, color=colour)
    upper.set(ylabel="share that is of the class", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    lower.set(xlabel="probability given, mean of its bin", ylabel="images", yscale="symlog")
    lower.yaxis.set_major_formatter("{x:g}")
    for axis in (upper, lower):
        axis.grid(alpha=0.25)
    upper.legend(fontsize=8)
    save(figure, path)


def estimates(
    path: Path, groups: dict[str, dict[str, tuple[float, tuple[float, float]]]], label: str, chance: float, title: str
) -> None:
    """Values with their intervals, a line for each: of every name in every group.

    Args:
        path: PNG to write.
        groups: {group: {name: (value, (low, high))}}; at most three groups.
        label: of the values' axis.
        chance: value that means nothing was learnt, a dotted line.
        title: over the values.
    """
    names = list(next(iter(groups.values())))
    figure = Figure(figsize=(6.4, 1.4 + 0.5 * len(names)), layout="constrained")
    axis = figure.subplots()
    for place, ((group, values), colour) in enumerate(zip(groups.items(), LINES, strict=False)):
        for line, name in enumerate(names):
            value, (low, high) = values[name]
            height = line + 0.18 * (place - (len(groups) - 1) / 2)
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
    """A confusion matrix: counts and per cent of each row, shaded by the latter.

    Args:
        path: PNG to write.
        matrix: int (K, K), rows truth, columns prediction.
        names: of the K classes.
        title: over the matrix.
    """
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(4.8, 4.8), layout="constrained")
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        colour = "white" if share[row, column] > 0.55 else "black"
        text = f"{count}\n{100 * share[row, column]:.1f} %"
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=11)
    labels = [name.replace(" ", "\n") for name in names]
    axis.set_xticks(range(len(names)), labels, fontsize=9)
    axis.set_yticks(range(len(names)), labels, fontsize=9)
    axis.set(xlabel="predicted", ylabel="truth")
    figure.suptitle(title, fontsize=11)  # over the whole width: over the axes it would be cut off
    save(figure, path)
