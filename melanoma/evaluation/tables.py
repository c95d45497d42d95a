"""The metrics of a split as compact tables: for the terminal, report.html and MODEL_CARD.md."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from melanoma.classes import CLASSES, MELANOMA, SPLIT_NAMES, TASKS
from melanoma.evaluation import scoring

AUCS = {**{CLASSES[index]: f"{CLASSES[index]} auc" for index in TASKS}, "mean": "mean auc"}  # keys of the metrics
COLUMNS = {  # name of the column: end of the metric's name
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "F1": "f1",
    "weighted F1": "weighted f1",
    "accuracy": "accuracy",
}
# Columns of the table of several systems: end of the metric's name, at the first operating point of each system.
COMPARED_AUCS = {f"{label} AUC": metric for label, metric in AUCS.items()}
COMPARED_F1 = {f"{CLASSES[MELANOMA]} F1": f"{CLASSES[MELANOMA]} f1", "weighted F1": f"{CLASSES[MELANOMA]} weighted f1"}
COMPARED = (*COMPARED_AUCS, *COMPARED_F1)


@dataclass(frozen=True)
class Value:
    """A metric with its 95 % interval."""

    value: float | None  # None: undefined
    interval: Sequence[float] | None = None

    @property
    def number(self) -> str:
        """The value without interval."""
        return "undefined" if self.value is None else f"{self.value:.3f}"

    @property
    def bounds(self) -> str:
        """The interval, as short as possible; "" if there is none."""
        return f"{self.interval[0]:.3f}-{self.interval[1]:.3f}" if self.interval else ""

    def __str__(self) -> str:
        """Value and interval for running text."""
        return self.number + (f" ({self.interval[0]:.3f} to {self.interval[1]:.3f})" if self.interval else "")


@dataclass(frozen=True)
class Row:
    """The metrics of one class at one operating point."""

    point: str
    threshold: float
    values: list[Value]  # one for each of COLUMNS


@dataclass(frozen=True)
class Task:
    """The metrics of one class against the rest."""

    name: str
    rows: list[Row]
    average_precision: Value
    calibration_error: Value


@dataclass(frozen=True)
class Summary:
    """All metrics of one split."""

    n: int
    classes: str  # number of images of each class
    aucs: dict[str, Value]  # see AUCS
    tasks: list[Task]
    balanced_accuracy: Value


def value_of(scored: dict[str, Any], name: str) -> Value:
    """One metric of {"metrics": {name: value}, "intervals": {name: interval}}."""
    return Value(scored["metrics"][name], scored["intervals"][name])


def summarise(scored: dict[str, Any], thresholds: dict[str, dict[str, float]]) -> Summary:
    """Arranges the metrics of one split.

    Args:
        scored: result of `scoring.score`.
        thresholds: {class: {operating point: probability}}.
    """
    tasks = []
    for name in (CLASSES[index] for index in TASKS):
        rows = [
            Row(point, threshold, [value_of(scored, f"{name} {metric} at {point}") for metric in COLUMNS.values()])
            for point, threshold in thresholds[name].items()
        ]
        average_precision = value_of(scored, f"{name} average precision")
        tasks.append(Task(name, rows, average_precision, value_of(scored, f"{name} calibration error")))
    return Summary(
        scored["n"],
        ", ".join(f"{count} {name}" for name, count in scored["of_each_class"].items()),
        {label: value_of(scored, metric) for label, metric in AUCS.items()},
        tasks,
        value_of(scored, "balanced accuracy"),
    )


def compared(results: dict[str, Any], split: str) -> dict[str, list[Value]]:
    """The metrics COMPARED of every system that is evaluated on a split; {} if that is the first system only.

    Args:
        results: {system: result of `scoring.evaluate_system`}.
        split: train, val or test.
    """
    rows = {}
    for name, system in results.items():
        if scored := system["splits"].get(split):
            point = next(iter(system["thresholds"][CLASSES[MELANOMA]]))
            metrics = [*COMPARED_AUCS.values(), *(f"{metric} at {point}" for metric in COMPARED_F1.values())]
            rows[name] = [value_of(scored, metric) for metric in metrics]
    return rows if rows.keys() - [next(iter(results))] else {}


def compared_caveats(results: dict[str, Any], split: str) -> dict[str, list[str]]:
    """Why metrics of the systems after the first are biased: {caveat: systems}; arguments as of `compared`."""
    found: dict[str, list[str]] = {}
    for name in list(results)[1:]:
        system = results[name]
        caveat = scoring.caveat(split, system) if split in system["splits"] else ""
        if caveat:
            found.setdefault(caveat, []).append(name)
    return found


def compared_lines(results: dict[str, Any], split: str) -> Iterator[str]:
    """The table of `compared`, whose arguments these are, for a terminal; nothing if there is nothing to compare."""
    if rows := compared(results, split):
        n = next(system["splits"][split]["n"] for system in results.values() if split in system["splits"])
        yield f"{SPLIT_NAMES[split].capitalize()}, n = {n}: all systems. F1 at the first operating point"
        table = [["", *(column.replace("seborrheic ", "") for column in COMPARED)]]
        for name, values in rows.items():
            table.append([name, *(value.number for value in values)])
            table.append(["", *(value.bounds for value in values)])
        yield from align(table, max(map(len, rows)))
        for caveat, names in compared_caveats(results, split).items():
            yield f"{', '.join(names)}:"
            yield f"  {caveat}"


def align(rows: Sequence[Sequence[str]], first_width: int) -> Iterator[str]:
    """Lines of a table: first column left-justified, the others right-justified, two spaces between columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(first_width), *map(str.rjust, others, widths[1:])]
        yield "  ".join(cells).rstrip()


def terminal_lines(name: str, split: str, system: dict[str, Any]) -> Iterator[str]:
    """The metrics of a system on one split for a terminal, at most 100 columns wide, intervals below the values.

    Args:
        name: name of the system.
        split: one of the system's.
        system: result of `scoring.evaluate_system`.
    """
    summary = summarise(system["splits"][split], system["thresholds"])
    yield f"{SPLIT_NAMES[split].capitalize()}, n = {summary.n}: {name}"
    yield f"{summary.classes}. Below each value: 95 % interval"
    if caveat := scoring.caveat(split, system):
        yield caveat
    aucs, width = summary.aucs.values(), max(map(len, CLASSES))  # all tables have first columns of one width
    auc_table = [["", *summary.aucs], ["AUC", *(auc.number for auc in aucs)], ["", *(auc.bounds for auc in aucs)]]
    yield from align(auc_table, width)
    for task in summary.tasks:
        table = [[task.name, *COLUMNS]]
        for row in task.rows:
            table.append([row.point, *(value.number for value in row.values)])
            table.append([f"  p >= {row.threshold:.3f}", *(value.bounds for value in row.values)])
        yield ""
        yield from align(table, width)
        yield f"average precision {task.average_precision}, calibration error {task.calibration_error}"
    yield ""
    yield f"predicted class (highest probability): balanced accuracy {summary.balanced_accuracy}"


def mask_lines(scored: dict[str, Any]) -> Iterator[str]:
    """One line for each metric of the masks of a split, see `scoring.score_masks`."""
    for name, value in scored["metrics"].items():
        yield f"  {name.replace('_', ' '):20}{Value(value, scored['intervals'][name])}"
