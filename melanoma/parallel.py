"""The same work in this process, in several processes here (joblib), or in those of a cluster (Dask).

Dask and not Ray: it is pure Python of a few megabytes where Ray's wheel has 79. Its own client and not joblib's backend
for it: that one works in the calling process where the cluster has one thread, and waits for ever for work over which
workers die again and again.
"""

import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from melanoma.command import log
from melanoma.errors import InputError

import joblib

if TYPE_CHECKING:
    import distributed

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 3  # times that work is taken up again after a worker's death before it is given up
DEATHS = (concurrent.futures.BrokenExecutor, concurrent.futures.CancelledError)
PATIENCE = 30  # seconds to wait for the scheduler of a cluster, and for a worker


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
        self.client: distributed.Client | None = None

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
            with contextlib.ExitStack() as stack:
                try:
                    client = stack.enter_context(distributed.Client(self.cluster, timeout=PATIENCE))
                    client.wait_for_workers(1, timeout=PATIENCE)
                except (OSError, TypeError, ValueError) as error:  # a timeout is an OSError, tls:// alone a TypeError
                    raise InputError(f"--cluster {self.cluster}: no scheduler with workers answers ({error})") from None
                stack.pop_all()
            self.client = client
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the cluster."""
        if self.client:
            self.client.close()

    def map(self, function: Callable[[T], R], items: Iterable[T], block: int = 256) -> Iterator[R]:
        """The function's results for all items, in their order.

        The work of a worker that dies is done again, by the others or by a new one.

        Args:
            function: pure, and found by its name in a module.
            items: read by this process alone, a block at a time.
            block: how many items, and at most as many results, are in memory.

        Raises:
            InputError: workers die again and again over the same items, or a cluster has none any more.
        """
        source = iter(items)
        place = self._on_cluster if self.client else self._here
        while part := list(itertools.islice(source, block)):
            yield from place(function, part)

    def _here(self, function: Callable[[T], R], rest: list[T]) -> Iterator[R]:
        attempts = 0
        while rest:
            parallel = joblib.Parallel(n_jobs=self.jobs or -1, return_as="generator")  # -1: one per core
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

    def _on_cluster(self, function: Callable[[T], R], part: list[T]) -> Iterator[R]:
        assert self.client
        futures = [self.client.submit(function, item, pure=False) for item in part]
        for future in futures:
            yield self._result(future)

    def _result(self, future: "distributed.Future") -> Any:
        from distributed import KilledWorker

        assert self.client
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return future.result(timeout=PATIENCE)
                if not self.client.nthreads():
                    raise InputError(f"--cluster {self.cluster}: its last worker is gone")
        except KilledWorker as error:  # after as many times as Dask is set to try
            raise InputError(f"--cluster {self.cluster}: workers die over the same work ({error})") from None
        except (concurrent.futures.CancelledError, OSError) as error:
            raise InputError(f"--cluster {self.cluster}: the scheduler is gone ({error})") from None
