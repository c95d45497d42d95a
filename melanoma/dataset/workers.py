"""Runs a function in this process, in several processes on this machine, or on a cluster (Dask).

Hand-written because joblib's processes share one pipe for their results: a worker that is killed while it writes leaves
half a message there, and joblib waits for the rest forever. Here each worker has its own pipe. Dask's client is used
directly because joblib's Dask backend waits forever for work that kills its workers.
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
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from melanoma.errors import InputError
from melanoma.log import log

import joblib

if TYPE_CHECKING:
    import distributed

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 3  # workers that may die on the same item
CLUSTER_TIMEOUT = 30  # seconds to wait for the scheduler of a cluster, and for a worker

Answer = tuple[Any, Exception | None]  # result, error


class Worker:
    """A process that runs functions for this one, and ends with it."""

    def __init__(self) -> None:
        """Starts the process."""
        self.connection, remote = multiprocessing.Pipe()
        command = [sys.executable, "-c", f"from melanoma.dataset import workers; workers.serve({remote.fileno()})"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with remote:  # its own process group, because Ctrl-C is handled by this process only
            self.process = subprocess.Popen(command, env=environment, pass_fds=[remote.fileno()], process_group=0)

    def stop(self) -> None:
        """Kills the process."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


def serve(handle: int) -> None:
    """Answers (function, item) with (result, None) or (None, error) until the pipe is closed; runs in a worker."""
    with Connection(handle) as connection, contextlib.suppress(EOFError, OSError):
        while True:
            message = connection.recv_bytes()
            answer: Answer
            try:
                function, item = pickle.loads(message)
                answer = function(item), None
            except Exception as error:
                answer = None, error
            connection.send(answer)


class Block(Generic[T, R]):
    """Items that are processed by worker processes; keeps track of which are waiting, being processed and done."""

    def __init__(self, function: Callable[[T], R], items: list[T], idle: list[Worker], jobs: int) -> None:
        """Prepares the work.

        Args:
            function: to apply to each item.
            items: its arguments.
            idle: workers to use; they are put back when they are free again.
            jobs: maximum number of workers at the same time; missing ones are started.
        """
        self.function, self.items, self.idle, self.jobs = function, items, idle, jobs
        self.waiting = deque(range(len(items)))  # indices into items, like all below
        self.busy: dict[Connection, tuple[Worker, int]] = {}
        self.answers: dict[int, Answer] = {}
        self.deaths = Counter[int]()

    def assign(self) -> None:
        """Gives waiting items to workers, as many as may work at the same time."""
        while self.waiting and len(self.busy) < self.jobs:
            worker, index = self.idle.pop() if self.idle else Worker(), self.waiting.popleft()
            self.busy[worker.connection] = worker, index
            with contextlib.suppress(OSError):  # the worker is dead; `collect` notices
                worker.connection.send((self.function, self.items[index]))

    def collect(self) -> None:
        """Waits for answers; puts back the item of a worker that died.

        Raises:
            InputError: ATTEMPTS workers died on the same item.
        """
        for connection in multiprocessing.connection.wait(self.busy):
            assert isinstance(connection, Connection)
            worker, index = self.busy.pop(connection)
            try:
                self.answers[index] = connection.recv()
                self.idle.append(worker)
            except (EOFError, OSError):
                worker.stop()
                self.waiting.appendleft(index)
                self.deaths[index] += 1
                if self.deaths[index] == ATTEMPTS:
                    raise InputError(
                        f"worker processes died {ATTEMPTS} times on {self.items[index]!r:.200}; probably too little "
                        "memory: --jobs 1 needs the least"
                    ) from None
                log.warning("a worker process died; its item is processed again")

    def results(self) -> Iterator[R]:
        """The results in the order of the items.

        Raises:
            Exception: whatever the function raises.
        """
        try:
            for index in range(len(self.items)):
                self.assign()
                while index not in self.answers:
                    self.collect()
                    self.assign()
                result, error = self.answers.pop(index)
                if error:
                    raise error
                yield result
        finally:
            for worker, _ in self.busy.values():
                worker.stop()


class Workers:
    """Where functions run: this process, several processes or a cluster; a context manager.

    The results do not depend on it: functions are pure, and results come in the order of the items.
    """

    def __init__(self, jobs: int | None, cluster: str | None = None) -> None:
        """Chooses where functions run.

        Args:
            jobs: processes on this machine; 1: this process, None: one process per core.
            cluster: address of a Dask scheduler, tcp://host:port, whose workers are used instead; they must see the
                images under the same paths and run the same code.
        """
        on_windows = os.name == "nt"
        if on_windows and (jobs or 1) > 1:
            raise InputError("--jobs: several processes do not work on Windows: leave --jobs out")
        self.jobs, self.cluster = jobs or (1 if on_windows else joblib.cpu_count()), cluster
        self.idle: list[Worker] = []
        self.client: distributed.Client | None = None

    def __enter__(self) -> "Workers":
        """Connects to the cluster, if there is one.

        Raises:
            InputError: Dask is not installed, or the scheduler or its workers do not answer.
        """
        if self.cluster:
            try:
                import distributed
            except ImportError:
                raise InputError("--cluster needs Dask: pip install -r requirements/cluster.txt") from None
            with contextlib.ExitStack() as stack:
                try:
                    client = stack.enter_context(distributed.Client(self.cluster, timeout=CLUSTER_TIMEOUT))
                    client.wait_for_workers(1, timeout=CLUSTER_TIMEOUT)
                except (OSError, TypeError, ValueError) as error:  # TypeError: tls:// without certificates
                    raise InputError(f"--cluster {self.cluster}: no scheduler with workers answers ({error})") from None
                stack.pop_all()
            self.client = client
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the worker processes, or disconnects from the cluster."""
        for worker in self.idle:
            worker.stop()
        if self.client:
            self.client.close()

    def map(self, function: Callable[[T], R], items: Iterable[T], block: int = 256) -> Iterator[R]:
        """Applies a function to all items; an item whose worker dies is processed again.

        Args:
            function: pure, and defined at the top level of a module.
            items: its arguments; read by this process only, a block at a time.
            block: number of items, and at most of results, that are in memory.

        Returns:
            The results in the order of the items.

        Raises:
            InputError: workers die repeatedly on the same item, or a cluster has no workers left.
        """
        iterator = iter(items)
        while part := list(itertools.islice(iterator, block)):
            if self.client:
                yield from self._map_on_cluster(self.client, function, part)
            elif self.jobs == 1:
                yield from map(function, part)
            else:
                yield from Block(function, part, self.idle, self.jobs).results()

    def _map_on_cluster(self, client: "distributed.Client", function: Callable[[T], R], items: list[T]) -> Iterator[R]:
        futures = [client.submit(function, item, pure=False) for item in items]
        for future in futures:
            yield self._wait(client, future)

    def _wait(self, client: "distributed.Client", future: "distributed.Future") -> Any:
        """The result of a future, as long as the cluster has workers."""
        from distributed import KilledWorker

        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return future.result(timeout=CLUSTER_TIMEOUT)
                if not client.nthreads():
                    raise InputError(f"--cluster {self.cluster}: the last worker is gone")
        except KilledWorker as error:  # after the number of attempts that Dask is configured for
            raise InputError(f"--cluster {self.cluster}: workers keep dying on the same item ({error})") from None
        except (concurrent.futures.CancelledError, OSError) as error:
            raise InputError(f"--cluster {self.cluster}: the scheduler is gone ({error})") from None
