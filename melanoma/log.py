"""Log lines and progress of the scripts."""

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

log = logging.getLogger("melanoma")


def progress(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yields the items; shows a bar on a terminal, else logs a line after every tenth; label "": shows nothing."""
    if not label:
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total)
        return
    tenths = 0
    for done, item in enumerate(items, start=1):
        yield item
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            log.info("%s %d/%d", label, done, total)
