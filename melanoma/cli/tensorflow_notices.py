"""Keeps the notices that TensorFlow prints while it starts off the terminal.

TensorFlow 2.21 prints some of them from static initialisers, before it reads its log level. So what arrives at file
descriptor 2 during its import goes through a process that prints everything except these notices: a process of its own,
so that the last words of an import that aborts are printed too.
"""

import contextlib
import importlib.machinery
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
FATAL_ONLY = "3"  # errors of a computation are raised as exceptions anyway
NOTICES = r"[IWE]\d{4} \d\d:\d\d:|WARNING: All log messages before absl|To enable the following instructions:"
READER = """
import re, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
unwanted = re.compile(sys.argv[1].encode())
for line in sys.stdin.buffer:
    if not unwanted.match(line):
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
"""


def hide() -> None:
    """Hides the notices of a later import of TensorFlow, unless the user asks for them by TF_CPP_MIN_LOG_LEVEL."""
    if os.environ.setdefault(LOG_LEVEL, FATAL_ONLY) == FATAL_ONLY:
        sys.meta_path.insert(0, TensorFlowFinder())


class TensorFlowFinder:
    """Import hook that filters the standard error of `import tensorflow`."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, with the filter around its execution; None for every other module."""
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == "tensorflow" else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_quietly(module: ModuleType) -> None:
                with filter_stderr():
                    execute(module)

            spec.loader.exec_module = execute_quietly  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def filter_stderr() -> Iterator[None]:
    """Removes the lines of NOTICES from everything that is written to file descriptor 2, also by native code."""
    try:
        terminal = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    reader = subprocess.Popen([sys.executable, "-S", "-c", READER, NOTICES], stdin=subprocess.PIPE, stdout=terminal)
    assert reader.stdin
    os.dup2(reader.stdin.fileno(), 2)
    try:
        yield
    finally:
        if sys.stderr:
            sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
        reader.stdin.close()
        reader.wait()
