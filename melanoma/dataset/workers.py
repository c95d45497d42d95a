"""Runs a function in this process, in several threads or processes on this machine, or on a cluster (Dask).

All of them are executors of `concurrent.futures`. Processes hand large results over in files: a pool's processes share
one pipe, where a process that is killed while it writes would leave half a message, and block the others for ever.
"""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from melanoma.errors import InputError
from melanoma.log import log

import joblib

if TYPE_CHECKING:
    import distributed

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 3  # times that processes may die on the same item
CHUNK = 8  # items that a worker takes at a time
AHEAD = 3  # chunks per worker that are processed before their results are wanted
SMALL = 2048  # bytes: below the 4096 that reach a pipe in one piece
CLUSTER_TIMEOUT = 30  # seconds to wait for the scheduler of a cluster, and for a worker


def prepare_process() -> None:
    """Lets a process of the pool leave Ctrl-C and SIGTERM to the main process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()
    parent = multiprocessing.parent_process()
    assert parent

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Names the file in errors of the system that do not, such as a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def without_script() -> Iterator[None]:
    """Lets processes that start in this context do without the script, whose imports take seconds and memory."""
    main = sys.modules["__main__"]
    path = main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        if path:
            main.__file__ = path


def apply(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The results of a function for a chunk of items."""
    return [function(item) for item in items]


def to_file(function: Callable[[T], R], items: Sequence[T], folder: str) -> bytes | str:
    """The pickled results of `apply`, or the path of a new file in `folder` that contains them if they are large."""
    content = pickle.dumps(apply(function, items))
    if len(content) <= SMALL:
        return content
    with naming(folder), tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(content)
    return file.name


def from_file(handed_over: bytes | str) -> Any:
    """The results that `to_file` handed over; deletes their file."""
    if isinstance(handed_over, bytes):
        return pickle.loads(handed_over)
    path = Path(handed_over)
    content = path.read_bytes()
    path.unlink()
    return pickle.loads(content)


class Workers:
    """Where functions run: this process, its threads, several processes or a cluster; a context manager.

    The results do not depend on it: functions are pure, and results come in the order of the items.
    """

    def __init__(self, jobs: int | None, cluster: str | None = None, threads: bool = False) -> None:
        """Chooses where functions run.

        Args:
            jobs: processes or threads on this machine; 1: this process without others, None: one per core.
            cluster: address of a Dask scheduler, tcp://host:port, whose workers are used instead; they must see the
                images under the same paths and run the same code.
            threads: use threads instead of processes.
        """
        alone = os.name == "nt" and not threads
        if alone and (jobs or 1) > 1:
            raise InputError("--jobs: several processes are not tested on Windows: leave --jobs out")
        self.jobs, self.cluster, self.threads = jobs or (1 if alone else joblib.cpu_count()), cluster, threads
        self.chunk = 1 if threads else CHUNK
        self.executor: Executor | None = None
        self.client: distributed.Client | None = None
        self.files = contextlib.ExitStack()

    def __enter__(self) -> "Workers":
        """Connects to the cluster, if there is one.

        Raises:
            InputError: Dask is not installed, or the scheduler or its workers do not answer.
        """
        if self.cluster:
            self.client = connect(self.cluster)
            self.executor = self.client.get_executor(pure=False)
            self.jobs = max(2, sum(self.client.nthreads().values()))
        elif self.jobs > 1 and self.threads:
            self.executor = ThreadPoolExecutor(self.jobs)
        elif self.jobs > 1:
            self.folder = self.files.enter_context(tempfile.TemporaryDirectory(prefix="melanoma_"))
            self.executor = self._pool()
        return self

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.jobs, multiprocessing.get_context("forkserver"), prepare_process)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends threads and processes, or disconnects from the cluster."""
        if self.client:
            self.client.close()
        elif self.executor:
            self.executor.shutdown(cancel_futures=True)
        self.files.close()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Applies a function to all items; what a dead process was processing is processed again.

        Args:
            function: pure, and defined at the top level of a module.
            items: its arguments; read by this process only, AHEAD chunks for each worker.

        Returns:
            The results in the order of the items.

        Raises:
            InputError: processes die repeatedly on the same items, or a cluster has no workers left.
        """
        if self.executor is None:
            yield from map(function, items)
            return
        waiting = deque[tuple[list[T], Future[Any]]]()
        iterator = iter(items)
        while chunk := list(itertools.islice(iterator, self.chunk)):
            waiting.append((chunk, self._submit(function, chunk)))
            if len(waiting) * self.chunk >= AHEAD * CHUNK * self.jobs:
                yield from self._next(function, waiting)
        while waiting:
            yield from self._next(function, waiting)

    def _submit(self, function: Callable[[T], R], chunk: list[T]) -> Future[Any]:
        assert self.executor
        if self.threads or self.client:
            return self.executor.submit(apply, function, chunk)
        with without_script():
            try:
                return self.executor.submit(to_file, function, chunk, self.folder)
            except BrokenProcessPool:
                self.executor = self._pool()
                return self.executor.submit(to_file, function, chunk, self.folder)

    def _next(self, function: Callable[[T], R], waiting: deque[tuple[list[T], Future[Any]]]) -> list[R]:
        """The results of the chunk that waits longest, which is removed."""
        chunk, future = waiting.popleft()
        try:
            results = self._wait(future)
            return results if self.threads or self.client else from_file(results)
        except BrokenProcessPool:
            log.warning("a worker process died; what it did is done again")
            again = [self._process_alone(function, item) for item in chunk]
            for place, (other, broken) in enumerate(waiting):
                if isinstance(broken.exception(), BrokenProcessPool):
                    waiting[place] = other, self._submit(function, other)
            return again

    def _process_alone(self, function: Callable[[T], R], item: T) -> R:
        """The result for an item while nothing else is processed, so that it is known which item kills a process."""
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(BrokenProcessPool):
                (result,) = from_file(self._submit(function, [item]).result())
                return result
        raise InputError(
            f"worker processes died {ATTEMPTS} times on {item!r:.200}; probably too little memory: --jobs 1 needs the "
            "least"
        )

    def _wait(self, future: Future[Any]) -> Any:
        """The result of a future, as long as a cluster has workers."""
        if not self.client:
            return future.result()
        from distributed import KilledWorker

        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return future.result(timeout=CLUSTER_TIMEOUT)
                if not self.client.nthreads():
                    raise InputError(f"--cluster {self.cluster}: the last worker is gone")
        except KilledWorker as error:  # after the number of attempts that Dask is configured for
            raise InputError(f"--cluster {self.cluster}: workers keep dying on the same item ({error})") from None
        except (CancelledError, OSError) as error:
            raise InputError(f"--cluster {self.cluster}: the scheduler is gone ({error})") from None


def connect(address: str) -> "distributed.Client":
    """A client of the Dask cluster with this scheduler.

    Raises:
        InputError: Dask is not installed, or the scheduler or its workers do not answer.
    """
    try:
        import distributed
    except ImportError:
        raise InputError("--cluster needs Dask: pip install -r requirements/cluster.txt") from None
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(distributed.Client(address, timeout=CLUSTER_TIMEOUT))
            client.wait_for_workers(1, timeout=CLUSTER_TIMEOUT)
        except (OSError, TypeError, ValueError) as error:  # TypeError: tls:// without certificates
            raise InputError(f"--cluster {address}: no scheduler with workers answers ({error})") from None
        stack.pop_all()
    return client
