"""What every script's command line shares: flags, exit codes, progress, the closing line."""

import argparse
import contextlib
import errno
import logging
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

from melanoma import hardware, runs
from melanoma.errors import InputError

from tqdm import tqdm

T = TypeVar("T")

log = logging.getLogger("melanoma")

# The operating system's word on a full disk, or on a folder that is none or may not be written: the user's to mend.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}


class Terminated(KeyboardInterrupt):
    """The system asks the process to end (SIGTERM), as a cloud does before it takes a machine away."""


def terminate(signal_number: int, frame: FrameType | None) -> None:
    """Ends the work as Ctrl-C would."""
    raise Terminated


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the script's docstring as it stands, and every flag's default."""


def positive_int(text: str) -> int:
    """An argparse type: a whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def seed(text: str) -> int:
    """An argparse type: a whole number that NumPy and Keras take as a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2**32 - 1")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def share(text: str) -> float:
    """An argparse type: a number from 0 up and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 up and below 1")
    return value


def at_least_one(text: str) -> float:
    """An argparse type: a number from 1 up."""
    value = float(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def parser(description: str) -> argparse.ArgumentParser:
    """A strict parser with the flags that every script has: --data, --graphics, --seed, --limit."""
    flags = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    flags.add_argument("--data", type=Path, default=Path("data"), help="folder of arrays and weights")
    flags.add_argument("--graphics", type=Path, default=Path("graphics"), help="folder of PNGs and figures")
    flags.add_argument("--seed", type=seed, default=0, help="seed of everything random")
    flags.add_argument("--limit", type=positive_int, help="N images of each split, classes in turns, for a quick try")
    return flags


def training_flags(
    flags: argparse.ArgumentParser,
    epochs: int | None,
    batch_size: int,
    learning_rate: float | None,
    averaging: float,
    note: str = "",
) -> None:
    """Adds the flags of the scripts that train; `note` says what a default of None stands for."""
    flags.add_argument("--epochs", type=positive_int, default=epochs, help="at most this many" + note)
    flags.add_argument(
        "--batch-size", type=positive_int, default=batch_size, help="images per step, on all devices together"
    )
    flags.add_argument("--learning-rate", type=positive_float, default=learning_rate, help="the highest" + note)
    flags.add_argument(
        "--averaging", type=share, default=averaging, help="momentum of the moving average of the weights; 0: none"
    )
    flags.add_argument(
        "--precision",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
        default="float32",
        help="of the computation; weights and results stay float32",
    )
    flags.add_argument("--restart", action="store_true", help="train anew instead of going on with an interrupted run")
    flags.add_argument(
        "--distribute",
        action="store_true",
        help="train on all GPUs of this machine, or on those of several (README, On several GPUs or machines)",
    )


def refuse(given: argparse.Namespace, flags: argparse.ArgumentParser, useless: Iterable[str], reason: str) -> None:
    """Refuses flags that would do nothing.

    Raises:
        InputError: one of the `useless` settings has another value than its default.
    """
    if names := [name for name in useless if getattr(given, name) != flags.get_default(name)]:
        raise InputError(f"{reason}: leave out {', '.join('--' + name.replace('_', '-') for name in names)}")


def progress(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Passes items through, with a bar on a terminal and a line for every tenth of the work in a log."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total)
        return
    tenth = 0
    for done, item in enumerate(items, start=1):
        yield item
        if done * 10 // total > tenth:
            tenth = done * 10 // total
            log.info("%s %d/%d", label, done, total)


def table(figures: dict[str, float | None], intervals: dict[str, tuple[float, float] | None]) -> Iterator[str]:
    """A line for each figure, with its 95 % interval."""
    for name, value in figures.items():
        bounds = intervals[name]
        shown = "undefined" if value is None else f"{value:.3f}"
        yield f"  {name.replace('_', ' '):56}{shown}" + (f"  ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")


def peak_memory() -> float:
    """Largest resident memory of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def again() -> str:
    """How to go on with what this command has begun."""
    return "the same command" + " without --restart" * ("--restart" in sys.argv)


def complaint(error: BaseException) -> tuple[str, int] | None:
    """What to say of an error that the user can mend, and the exit code; None: it is another."""
    if isinstance(error, InputError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = error.filename or "writing"
        return f"{place}: {error.strerror}; mend that and run the command again", InputError.exit_code
    if isinstance(error, KeyboardInterrupt):
        by = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        return f"interrupted; {again()} goes on", 128 + by
    advice = hardware.advice(error)
    return (advice, InputError.exit_code) if advice else None


def run(
    flags: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], None],
    writes: Sequence[str] = ("data", "graphics"),
) -> None:
    """Parses the command line, runs `main`, and exits.

    Exit codes: 0 done; 2 bad usage, bad input, or a machine that cannot; 3 an earlier stage is missing or stale; 130
    interrupted, 143 by SIGTERM; 1 a bug.

    Args:
        flags: the command line.
        main: the work.
        writes: settings that name folders to write to. They are tried before any work, and no other run may be at work
            in that of "data"; members of a distributed job but for the first, which alone writes, do neither.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, terminate)
    start = time.perf_counter()
    try:
        arguments = flags.parse_args()
        with contextlib.ExitStack() as stack:
            if not getattr(arguments, "distribute", False) or runs.is_leader():
                for name in writes:
                    runs.check_writable(getattr(arguments, name))
                if "data" in writes:
                    stack.enter_context(runs.alone(arguments.data))
            main(arguments)
    except BaseException as error:
        if not (found := complaint(error)):
            raise
        print(f"{flags.prog}: {found[0]}", file=sys.stderr)
        sys.exit(found[1])
    log.info("done in %.0f s, peak memory %.2f GiB", time.perf_counter() - start, peak_memory())
