"""Log lines and progress of the scripts."""

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

log = logging.getLogger("melanoma")


def progress(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yields the items; shows a bar on a terminal, else logs a line after every tenth of the total."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total)
        return
    tenths = 0
    for done, item in enumerate(items, start=1):
        yield item
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            log.info("%s %d/%d", label, done, total)


def format_table(metrics: dict[str, float | None], intervals: dict[str, tuple[float, float] | None]) -> Iterator[str]:
    """Formats one line for each metric, with its 95 % confidence interval where there is one."""
    for name, value in metrics.items():
        bounds = intervals[name]
        shown = "undefined" if value is None else f"{value:.3f}"
        yield f"  {name.replace('_', ' '):56}{shown}" + (f"  ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")
