"""The same work in this process, in several processes here, or in those of a cluster (Dask).

Here: a pipe for each process and not joblib's, which all share one. A process that is killed while it writes a result
there leaves half a message, and joblib waits for the other half for ever (seen at the fifth kill of a series).

Dask and not Ray: it is pure Python of a few megabytes where Ray's wheel has 79. Its own client and not joblib's backend
for it: that one works in the calling process where the cluster has one thread, and waits for ever for work over which
workers die again and again.
"""

import concurrent.futures
import contextlib
import itertools
import multiprocessing.connection
import os
import pickle
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from melanoma.command import log
from melanoma.errors import InputError

import joblib

if TYPE_CHECKING:
    import distributed

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 3  # times that workers may die over the same item
PATIENCE = 30  # seconds to wait for the scheduler of a cluster, and for a worker


class Worker:
    """A process that works for this one, and ends with it."""

    def __init__(self) -> None:
        """Starts it."""
        self.connection, theirs = multiprocessing.Pipe()
        words = [sys.executable, "-c", f"from melanoma import parallel; parallel.serve({theirs.fileno()})"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with theirs:  # in a group of its own: Ctrl-C is for this process
            self.process = subprocess.Popen(words, env=environment, pass_fds=[theirs.fileno()], process_group=0)

    def stop(self) -> None:
        """Ends it, whatever it is at."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


def serve(handle: int) -> None:
    """The life of a worker: answers (function, item) with (result, None) or (None, error) until the pipe is closed."""
    with Connection(handle) as connection, contextlib.suppress(EOFError, OSError):
        while True:
            message = connection.recv_bytes()
            answer: tuple[Any, Exception | None]
            try:
                function, item = pickle.loads(message)
                answer = function(item), None
            except Exception as error:
                answer = None, error
            connection.send(answer)


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
        self.jobs, self.cluster = jobs or joblib.cpu_count(), cluster
        self.idle: list[Worker] = []
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
        """Ends the workers, or leaves the cluster."""
        for worker in self.idle:
            worker.stop()
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

    def _here(self, function: Callable[[T], R], part: list[T]) -> Iterator[R]:
        if self.jobs == 1:
            yield from map(function, part)
            return
        waiting, deaths = deque(range(len(part))), Counter[int]()  # places in `part`
        busy: dict[Connection, tuple[Worker, int]] = {}
        answers: dict[int, tuple[Any, Exception | None]] = {}
        try:
            for place in range(len(part)):
                while True:
                    while waiting and len(busy) < self.jobs:
                        worker, number = self.idle.pop() if self.idle else Worker(), waiting.popleft()
                        busy[worker.connection] = worker, number
                        with contextlib.suppress(OSError):  # it is dead, as will be seen below
                            worker.connection.send((function, part[number]))
                    if place in answers:
                        break
                    ready = multiprocessing.connection.wait(busy)
                    for connection in [connection for connection in busy if connection in ready]:
                        worker, number = busy.pop(connection)
                        try:
                            answers[number] = connection.recv()
                            self.idle.append(worker)
                        except (EOFError, OSError):
                            worker.stop()
                            waiting.appendleft(number)
                            deaths[number] += 1
                            if deaths[number] == ATTEMPTS:
                                raise InputError(
                                    f"worker processes died {ATTEMPTS} times over {part[number]!r:.200}; is there "
                                    "enough memory? --jobs 1 needs the least"
                                ) from None
                            log.warning("a worker process died; its work is done again")
                answer, error = answers.pop(place)
                if error:
                    raise error
                yield answer
        finally:
            for worker, _ in busy.values():
                worker.stop()

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
