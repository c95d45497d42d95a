"""Keeps the notices that TensorFlow prints while it starts off the terminal.

TensorFlow 2.21 prints some of them from static initialisers, before it reads its log level. So what arrives at file
descriptor 2 during its import is held back, and everything that is not such a notice is printed afterwards.
"""

import contextlib
import importlib.machinery
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from types import ModuleType

LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
FATAL_ONLY = "3"  # errors of a computation are raised as exceptions anyway
NOTICES = re.compile(
    rb"^(?:[IWE]\d{4} \d\d:\d\d:|WARNING: All log messages before absl|To enable the following instructions:).*\n?",
    re.MULTILINE,
)


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
                with filter_stderr(NOTICES):
                    execute(module)

            spec.loader.exec_module = execute_quietly  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def filter_stderr(unwanted: re.Pattern[bytes]) -> Iterator[None]:
    """Removes what matches from everything that is written to file descriptor 2, by C++ code too."""
    with contextlib.ExitStack() as stack:
        try:
            terminal = os.dup(2)
            stack.callback(os.close, terminal)
            held = stack.enter_context(tempfile.TemporaryFile())
        except OSError:  # no standard error, or no folder for temporary files
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            if sys.stderr:
                sys.stderr.flush()
            os.dup2(terminal, 2)
            held.seek(0)
            os.write(2, unwanted.sub(b"", held.read()))
