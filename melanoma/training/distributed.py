"""Training on several devices: the GPUs of one machine, or processes on several machines.

TensorFlow: `tf.distribute.MirroredStrategy`, one machine only, because Keras' `fit` fails under its multi-worker
strategy. JAX: `keras.distribution.DataParallel` over all devices of all processes, which find each other through the
environment variables of `keras.distribution.initialize`: KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and
_PROCESS_ID.

The rows of a step are divided among the devices. Loss, gradients and batch normalisation statistics are those of the
whole batch; only the order of summation differs. Process 0 leads: it alone writes files, and it continues alone after
training.

The processes keep their own connection to process 0. JAX does notice a lost process, but ends the others from native
code, after a minute or more, or at once with pages of its internals.
"""

import contextlib
import hashlib
import logging
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

from melanoma.cli import locking, run
from melanoma.errors import InputError
from melanoma.log import log
from melanoma.models import backbones, fused_batchnorm
from melanoma.training.batches import Batches

import keras
import numpy as np

START_TIMEOUT = 300  # seconds to wait for the other processes to start, as JAX does
CONNECTION_TIMEOUT = 30  # seconds after which a machine that does not answer counts as lost
DETECTION_TIME = 5  # seconds within which the end of a process is noticed while its machine is up
NUMBER, ADDRESSES = r"\d+", r"([^,]+):(\d+)(?:,.*)?"
HELP = "; see docs/distributed.md"
BYE, GO, READY = b"bye\n", b"go\n", b"ready\n"


# ----------------------------------------------------------------------------------------------------------- processes


def keep_alive(connection: socket.socket) -> None:
    """Sets TCP keep-alive so that a lost machine is noticed within CONNECTION_TIMEOUT."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", CONNECTION_TIMEOUT // 3),
        ("TCP_KEEPINTVL", CONNECTION_TIMEOUT // 6),
        ("TCP_KEEPCNT", 4),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def connect_when_ready(host: str, port: int) -> socket.socket:
    """Connects to a process that may not have started yet."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=CONNECTION_TIMEOUT)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            connection.settimeout(None)
            return connection


def forward(source: socket.socket, target: socket.socket) -> None:
    """Forwards data from one socket to another, but not the end of the stream."""
    with contextlib.suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)


class Peers:
    """Connections of one process to the others: process 0 to all of them, the others to process 0."""

    def __init__(self, host: str, port: int, process: int, processes: int) -> None:
        """Connects.

        Args:
            host: host of process 0.
            port: on which it listens.
            process: index of this process, from 0.
            processes: number of processes.

        Raises:
            InputError: the others do not connect within START_TIMEOUT.
        """
        self.process, self.processes = process, processes
        self.arrived = threading.Semaphore(0)
        self.over = threading.Lock()  # held by the thread that ends this process or leaves the others
        self.connections: dict[int, socket.socket] = {}
        try:
            if process == 0:
                self._gather(port)
            else:
                self._join(host, port)
        except OSError as error:
            there = (
                f"{1 + len(self.connections)} of {processes} processes connected"
                if not process
                else "process 0 does not answer"
            )
            raise InputError(f"--distribute: {there} at {host}:{port} within {START_TIMEOUT} s ({error})") from None
        for number, connection in self.connections.items():
            keep_alive(connection)
            threading.Thread(target=self._watch, args=(number, connection), daemon=True).start()

    def _gather(self, port: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        with socket.create_server(("", port)) as server:
            while len(self.connections) < self.processes - 1:
                server.settimeout(max(0.1, deadline - time.monotonic()))
                with contextlib.ExitStack() as stack:  # closes the connection on an error
                    connection = stack.enter_context(server.accept()[0])
                    connection.settimeout(CONNECTION_TIMEOUT)
                    greeting = connection.recv(len(self._greeting()), socket.MSG_WAITALL)
                    connection.settimeout(None)
                    number = int.from_bytes(greeting[:4], "big")
                    if not 0 < number < self.processes or number in self.connections:
                        raise InputError(
                            f"--distribute: process id {number} is used twice, or not below {self.processes}"
                        )
                    if greeting[4:] != self._greeting()[4:]:
                        raise InputError(
                            f"--distribute: process {number} was started with flags that differ from those of process 0"
                        )
                    self.connections[number] = connection
                    stack.pop_all()

    def _greeting(self) -> bytes:
        """Index and hash of the flags of this process."""
        return self.process.to_bytes(4, "big") + hashlib.sha256(repr(sys.argv[1:]).encode()).digest()

    def _join(self, host: str, port: int) -> None:
        connection = connect_when_ready(host, port)
        connection.sendall(self._greeting())
        self.connections[0] = connection

    def coordinator(self, host: str, port: int) -> str:
        """Address of the JAX coordinator, which runs in process 0.

        Other processes reach it through a local proxy: JAX aborts with a native trace as soon as its connection to the
        coordinator closes, so the proxy keeps that connection open when process 0 ends.
        """
        if not self.process:
            return f"{host}:{port}"
        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._forward, args=(server, host, port), daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    def _forward(self, server: socket.socket, host: str, port: int) -> None:
        while True:
            near, _ = server.accept()
            far = connect_when_ready(host, port)
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=forward, args=(source, target), daemon=True).start()

    def _watch(self, number: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            for line in lines:
                if line == BYE:
                    return
                if line in (GO, READY):
                    self.arrived.release()
                else:
                    self._stop_with_peer(line.decode().strip())
        self._stop_with_peer(f"process {number} of {self.processes} has ended or cannot be reached")

    def _stop_with_peer(self, reason: str) -> None:
        if self.over.acquire(blocking=False):
            advice = f"Run {run.resume_hint()} on all machines to resume from the last checkpoint."
            self._end(reason, f"{reason}\nProcess {self.process} stops too. {advice}", InputError.exit_code)

    def _end(self, reason: str, message: str, code: int) -> None:
        """Ends this process at once: its main thread may be blocked in a step or in JAX's shutdown."""
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{' '.join(reason.split())}\n".encode(errors="backslashreplace"))
        sys.stdout.flush()
        line = f"{Path(sys.argv[0]).name}: {message}\n"
        sys.stderr.write(line)  # in one call: other processes write to the same terminal
        sys.stderr.flush()
        os._exit(code)

    def fail(self, error: BaseException) -> None:
        """Ends this process and the others after an error."""
        known = run.user_message(error)
        if not known:
            time.sleep(DETECTION_TIME)  # perhaps JAX failed because a peer is gone: `_watch` is about to report it
        with self.over:
            message, code = known or ("".join(traceback.format_exception(error)), 1)
            reason = f"process {self.process} of {self.processes} has ended: {known[0] if known else repr(error)}"
            self._end(reason, message, code)

    def wait(self) -> None:
        """Waits until all processes have reached this point."""
        for connection in self.connections.values() if self.process else ():
            connection.sendall(READY)
        for _ in self.connections:
            self.arrived.acquire()
        for connection in self.connections.values() if not self.process else ():
            connection.sendall(GO)

    def leave(self) -> None:
        """Announces to the others that this process ends normally."""
        self.over.acquire()
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(BYE)


# ----------------------------------------------------------------------------------------------------------- one device


class Devices:
    """The devices used for training; this base class is the single default device of Keras."""

    process = 0  # index of this process, from 0
    replicas = 1  # devices among which the rows of a step are divided, over all processes

    @property
    def leads(self) -> bool:
        """Whether this process writes files, logs, and continues after training."""
        return self.process == 0

    def wait(self) -> None:
        """Waits until all processes have reached this point."""

    @contextlib.contextmanager
    def trainer(
        self, model: keras.Model, train: Batches, validation: Batches | None
    ) -> Iterator[tuple[keras.Model, Any, Any, list[keras.callbacks.Callback]]]:
        """A model to compile and fit on these devices, and the batches to fit it to.

        Yields:
            The model to fit; its training and validation batches; callbacks that must come before any that reads the
            weights of `model`. Variables of the model and its optimizer can be assigned NumPy arrays, the same in all
            processes, and converted to them.
        """
        yield keras.Model(model.inputs, model.outputs), train, validation, []


ONE = Devices()


def copy_variables(source: keras.Model, target: keras.Model) -> None:
    """Copies all variables, including those of random generators, to a model of the same structure."""
    for one, other in zip(source.variables, target.variables, strict=True):
        other.assign(keras.ops.convert_to_numpy(one))
    fused_batchnorm.update_normalization(backbones.flatten_layers(target))


class WrappedDataset(keras.utils.PyDataset):
    """Base class of datasets that wrap `Batches`."""

    def __init__(self, batches: Batches) -> None:
        """Wraps the batches."""
        super().__init__(batches.workers, use_multiprocessing=False, max_queue_size=batches.max_queue_size)
        self.batches = batches

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.batches)

    def on_epoch_end(self) -> None:
        """Draws the order of the next epoch."""
        self.batches.on_epoch_end()


class CopyBackCallback(keras.callbacks.Callback):
    """Copies the trained variables into the model that is kept, after every epoch."""

    def __init__(self, kept: keras.Model) -> None:
        """Sets the model that is kept."""
        super().__init__()
        self.kept = kept

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Copies the variables."""
        copy_variables(self.model, self.kept)


# ----------------------------------------------------------------------------------------------------------- TensorFlow


class MirroredModel(keras.Model):
    """A model whose gradients do not depend on how the rows of a step are divided among the replicas."""

    def _maybe_symbolic_build(self, **_: Any) -> None:
        """Does nothing: `training.loop.fit` builds the model."""

    def compute_loss(self, x: Any = None, *arguments: Any, training: bool = True, **more: Any) -> Any:
        """The replica's mean loss, with the gradient of its part of the mean over all rows.

        Keras averages the replicas' means, which is another value if the replicas have different numbers of rows.
        """
        import tensorflow as tf

        loss = super().compute_loss(x, *arguments, training=training, **more)
        context = tf.distribute.get_replica_context()
        if not training or context is None:
            return loss
        rows = tf.cast(tf.shape(x)[0], loss.dtype)
        total = context.all_reduce(tf.distribute.ReduceOp.SUM, rows)
        part = loss * rows * context.num_replicas_in_sync / total
        return part + tf.stop_gradient(loss - part)


class RepeatedDataset(WrappedDataset):
    """Repeats batches of fewer rows than replicas once per replica: same results, and no replica is empty."""

    def __init__(self, batches: Batches, replicas: int) -> None:
        """Wraps the batches for a number of replicas."""
        super().__init__(batches)
        self.replicas = replicas

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """One batch."""
        batch = self.batches[index]
        return tuple(np.concatenate([one] * self.replicas) for one in batch) if len(batch[0]) < self.replicas else batch


class Mirrored(Devices):
    """The GPUs of this machine, by `tf.distribute.MirroredStrategy`."""

    def __init__(self) -> None:
        """Uses all GPUs that TensorFlow sees, or else all its logical CPUs."""
        import tensorflow as tf

        found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        self.strategy = tf.distribute.MirroredStrategy([device.name for device in found])
        self.replicas = self.strategy.num_replicas_in_sync

    @contextlib.contextmanager
    def trainer(
        self, model: keras.Model, train: Batches, validation: Batches | None
    ) -> Iterator[tuple[keras.Model, Any, Any, list[keras.callbacks.Callback]]]:
        """See `Devices.trainer`.

        In the training metrics of an epoch, a last batch of fewer rows than replicas counts once per replica.
        """
        with self.strategy.scope():
            clone = keras.models.clone_model(model)
            for layer in backbones.flatten_layers(clone):
                if isinstance(layer, keras.layers.BatchNormalization):
                    layer.synchronized = True  # statistics of all rows of the step
            copy_variables(model, clone)
            trainer = MirroredModel(clone.inputs, clone.outputs)
            yield (
                trainer,
                RepeatedDataset(train, self.replicas),
                validation and self._evenly(validation),
                [CopyBackCallback(model)],
            )

    def _evenly(self, batches: Batches) -> Batches:
        """The same rows in batches that give every replica some rows; metrics do not depend on the batch size.

        Raises:
            InputError: there are fewer rows than replicas.
        """
        count = len(batches.rows)
        for size in range(batches.batch_size, max(count, batches.batch_size) + 1):
            if min(count, size, count % size or size) >= self.replicas:
                evenly = copy(batches)
                evenly.batch_size = size
                return evenly
        raise InputError(f"--distribute: {count} validation images are fewer than {self.replicas} devices")


# ------------------------------------------------------------------------------------------------------------------ JAX


class ShardedDataset(WrappedDataset):
    """One process's part of each batch, padded with rows that `ShardedModel` cuts off.

    JAX needs the same number of rows on each device. Batches keep two lengths: `batch_size`, and that of a smaller last
    batch, padded to the next multiple of the replicas that is not `batch_size`.
    """

    def __init__(self, batches: Batches, devices: "Sharded") -> None:
        """Wraps the batches of all devices together."""
        super().__init__(batches)
        self.devices = devices
        self.last = batches.length % batches.batch_size
        padded = math.ceil(self.last / devices.replicas) * devices.replicas
        self.last_padded = padded + devices.replicas if padded == batches.batch_size else padded

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """This process's part of a batch."""
        start = index * self.batches.batch_size
        end = min(start + self.batches.batch_size, self.batches.length)
        length = self.batches.batch_size if end - start == self.batches.batch_size else self.last_padded
        rows = length // self.devices.processes
        first = min(start + self.devices.process * rows, end)
        part = self.batches.part(first, min(first + rows, end))
        return tuple(np.concatenate([one, np.zeros((rows - len(one), *one.shape[1:]), one.dtype)]) for one in part)


class ShardedModel(keras.Model):
    """Cuts the padding off each batch and divides the remaining rows among the devices."""

    def set_batches(self, train: ShardedDataset, validation: ShardedDataset | None, rows: Any) -> "ShardedModel":
        """Sets the datasets and the JAX sharding of `rows`."""
        self.of_step, self.rows = {"train": train, "test": validation}, rows
        return self

    def _without_padding(self, data: Any, dataset: ShardedDataset | None) -> Any:
        import jax

        assert dataset
        if len(data[0]) == dataset.batches.batch_size:
            return data
        return tuple(jax.lax.with_sharding_constraint(one[: dataset.last], self.rows) for one in data)

    def train_step(self, state: Any, data: Any) -> Any:
        """Keras' step on the rows without padding."""
        return super().train_step(state, self._without_padding(data, self.of_step["train"]))

    def test_step(self, state: Any, data: Any) -> Any:
        """Keras' step on the rows without padding."""
        return super().test_step(state, self._without_padding(data, self.of_step["test"]))


class Sharded(Devices):
    """All devices of one or more processes, by `keras.distribution` on JAX."""

    def __init__(self, peers: Peers | None) -> None:
        """Uses the devices of this process and of its peers, if there are any."""
        self.peers = peers
        self.process, self.processes = (peers.process, peers.processes) if peers else (0, 1)
        self.distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
        self.replicas = self.distribution.device_mesh.devices.size

    def wait(self) -> None:
        """Waits until all processes have reached this point."""
        if self.peers:
            self.peers.wait()

    def agree(self, model: keras.Model) -> None:
        """Copies the weights of process 0 into a model of every process."""
        if self.peers:
            from jax.experimental import multihost_utils

            self.wait()  # so that no process blocks in a collective operation while another does something long
            model.set_weights([np.asarray(one) for one in multihost_utils.broadcast_one_to_all(model.get_weights())])

    @contextlib.contextmanager
    def trainer(
        self, model: keras.Model, train: Batches, validation: Batches | None
    ) -> Iterator[tuple[keras.Model, Any, Any, list[keras.callbacks.Callback]]]:
        """See `Devices.trainer`.

        Raises:
            InputError: the rows of a batch cannot be divided evenly.
        """
        if train.batch_size % self.replicas:
            raise InputError(
                f"--batch-size {train.batch_size} must be a multiple of the number of devices, {self.replicas}"
            )
        self.agree(model)
        rows = self.distribution.get_data_layout((train.batch_size,)).backend_layout
        sharded_train, sharded_validation = (
            ShardedDataset(train, self),
            ShardedDataset(validation, self) if validation else None,
        )
        with self.distribution.scope():
            clone = keras.models.clone_model(model)
            copy_variables(model, clone)
            trainer = ShardedModel(clone.inputs, clone.outputs).set_batches(sharded_train, sharded_validation, rows)
            yield trainer, sharded_train, sharded_validation, [CopyBackCallback(model)]


# ------------------------------------------------------------------------------------------------- choice of devices


def setting(name: str, form: str) -> re.Match[str]:
    """One of Keras' environment variables.

    Raises:
        InputError: it is not set, or has another format.
    """
    found = re.fullmatch(form, os.environ.get(locking.PREFIX + name, ""))
    if not found:
        raise InputError(
            f"--distribute: {locking.PREFIX}{name} is {os.environ.get(locking.PREFIX + name, 'not set')}{HELP}"
        )
    return found


@contextlib.contextmanager
def devices(distribute: bool) -> Iterator[Devices]:
    """The devices used for training. Enter it before any other use of JAX; the processes disconnect at the end.

    Args:
        distribute: whether to use all GPUs of this machine and of the machines in Keras' environment variables (on JAX
            without GPUs, all CPU devices); otherwise the default device.

    Raises:
        InputError: the backend does not support it, or the other processes do not connect.
    """
    if not distribute:
        yield ONE
        return
    backend = keras.backend.backend()
    several = locking.PREFIX + "NUM_PROCESSES" in os.environ
    processes = int(setting("NUM_PROCESSES", NUMBER)[0]) if several else 1
    if backend not in ("tensorflow", "jax"):
        raise InputError(f"--distribute works on TensorFlow and JAX, not on {backend}: set KERAS_BACKEND=jax")
    if backend == "tensorflow":
        if processes > 1:
            raise InputError("--distribute: several machines need JAX: set KERAS_BACKEND=jax")
        yield Mirrored()
        return
    if processes == 1:
        yield Sharded(None)
        return
    with together(processes) as peers:
        if peers.process:
            log.setLevel(logging.WARNING)
        yield Sharded(peers)


@contextlib.contextmanager
def together(processes: int) -> Iterator[Peers]:
    """Connects the processes named by Keras' environment variables, and disconnects them at the end."""
    import jax

    process = int(setting("PROCESS_ID", NUMBER)[0])
    host, port = setting("JOB_ADDRESSES", ADDRESSES).groups()
    peers = Peers(host, int(port) + 1, process, processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize(peers.coordinator(host, int(port)), processes, process)
    try:
        yield peers
        peers.wait()
    except BaseException as error:
        peers.fail(error)
    jax.distributed.shutdown()
    peers.leave()
