"""The same work in this process, in several processes here, or in those of a Dask cluster: joblib's backends.

Dask and not Ray: joblib brings the backend along, and it is pure Python of a few megabytes where Ray's wheel has 79.
"""

import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from melanoma.command import log
from melanoma.errors import InputError

import joblib

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 3  # times that work is taken up again after a worker's death before it is given up
DEATHS = (concurrent.futures.BrokenExecutor, concurrent.futures.CancelledError)
PATIENCE = 30  # seconds to wait for the scheduler of a cluster, and for its first worker


class Workers:
    """Where work is done; a context manager.

    The results do not depend on it: functions are pure, and results come in the order of the items.
    """

    def __init__(self, jobs: int | None, cluster: str | None = None) -> None:
        """Chooses the place.

        Args:
            jobs: processes on this machine; 1 is this very process, None one per core.
            cluster: address of a Dask scheduler, tcp://host:port, whose workers do the work instead; they must see the
                photographs under the same paths and run the same code.
        """
        self.jobs, self.cluster = jobs, cluster
        self.resources = contextlib.ExitStack()

    def __enter__(self) -> "Workers":
        """Connects to the cluster, where there is one.

        Raises:
            InputError: Dask is not installed, or scheduler or workers do not answer.
        """
        if self.cluster:
            try:
                import distributed
            except ImportError:
                raise InputError("--cluster needs Dask: pip install -r requirements-cluster.txt") from None
            try:
                client = distributed.Client(self.cluster, timeout=PATIENCE, set_as_default=True)
                self.resources.enter_context(client)
                client.wait_for_workers(1, timeout=PATIENCE)
            except (OSError, ValueError, TimeoutError) as error:
                self.resources.close()
                raise InputError(f"--cluster {self.cluster}: no scheduler with workers answers ({error})") from None
            self.resources.enter_context(joblib.parallel_config(backend="dask"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the cluster."""
        self.resources.close()

    def map(self, function: Callable[[T], R], items: Iterable[T], block: int = 256) -> Iterator[R]:
        """The function's results for all items, in their order.

        A worker that dies is replaced and its work done again, here by taking up the rest anew, on a cluster by Dask.

        Args:
            function: pure, and found by its name in a module.
            items: read by this process alone, a block at a time.
            block: how many items, and at most as many results, are in memory.

        Raises:
            InputError: workers die again and again over the same items.
        """
        source = iter(items)
        while rest := list(itertools.islice(source, block)):
            attempts = 0
            while rest:
                parallel = joblib.Parallel(n_jobs=self.jobs or -1, return_as="generator")  # -1: all that there are
                done = 0
                try:
                    for result in parallel(joblib.delayed(function)(item) for item in rest):
                        done, attempts = done + 1, 0
                        yield result
                except DEATHS as error:
                    attempts += 1
                    if attempts == ATTEMPTS:
                        raise InputError(
                            f"worker processes died {ATTEMPTS} times over {rest[done]!r:.200} or one of the next "
                            f"({error}); is there enough memory? --jobs 1 needs the least"
                        ) from None
                    log.warning("a worker process died; its work is done again")
                rest = rest[done:]
