"""A Dask cluster on loopback."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """A running scheduler and its workers."""

    address: str
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextlib.contextmanager
def start(workers: int, allowed_failures: int = 3) -> Iterator[Cluster]:
    """Starts a cluster, and kills it at the end."""
    port = str(free_port())
    address = f"tcp://127.0.0.1:{port}"
    dask = (sys.executable, "-m", "dask")
    scheduler = (*dask, "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
    worker = (*dask, "worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard")
    environment = os.environ | {
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with contextlib.ExitStack() as stack:
        processes = []
        for command in (scheduler, *[worker] * workers):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield Cluster(address, processes[0], processes[1:])
