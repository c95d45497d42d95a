"""Training on several devices: the GPUs of one machine, or processes on several machines.

TensorFlow: `tf.distribute.MirroredStrategy`, one machine alone, for Keras' `fit` fails under its strategy of several.
JAX: `keras.distribution.DataParallel` over all devices of all processes, which find each other by the variables of
`keras.distribution.initialize`, KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and _PROCESS_ID.

A step's rows are shared among the devices, and give the loss, the gradients and the statistics of batch normalisation
that they give together; the order of summing alone is another. Process 0 leads: it alone writes, and it goes on alone
when training is over.

Processes keep a connection of their own with process 0. JAX does notice that one is gone, but by ending the others
from native code, after a minute or more, or at once with pages of its inner workings.
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
from typing import TYPE_CHECKING, Any

from melanoma import backbones, command
from melanoma.errors import InputError
from melanoma.runs import PREFIX

import keras
import numpy as np

if TYPE_CHECKING:
    from melanoma.training import Batches

PATIENCE = 300  # seconds to wait for the others to start, as JAX does
SILENCE = 30  # seconds after which a machine that does not answer is given up
NOTICE = 5  # seconds within which the end of a process is seen, while its machine is there
NUMBER, ADDRESSES = r"\d+", r"([^,]+):(\d+)(?:,.*)?"
HELP = "; see README, On several GPUs or machines"
BYE, GO, READY = b"bye\n", b"go\n", b"ready\n"


# ------------------------------------------------------------------------------------------------ who is still there


def keep_alive(connection: socket.socket) -> None:
    """Lets the system notice within SILENCE that the machine at the other end is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", SILENCE // 3), ("TCP_KEEPINTVL", SILENCE // 6), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def patiently_connect(host: str, port: int) -> socket.socket:
    """A connection to a process that may be about to start."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=SILENCE)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            connection.settimeout(None)
            return connection


def pump(source: socket.socket, target: socket.socket) -> None:
    """Passes on what comes, but not the end of it."""
    with contextlib.suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)


class Peers:
    """The other processes of a training, as one of them sees them: process 0 sees all, the others see process 0."""

    def __init__(self, host: str, port: int, process: int, processes: int) -> None:
        """Connects.

        Args:
            host: of process 0.
            port: where it listens for the others.
            process: number of this one, from 0.
            processes: how many there are.

        Raises:
            InputError: the others do not come within PATIENCE.
        """
        self.process, self.processes = process, processes
        self.arrived = threading.Semaphore(0)
        self.over = threading.Lock()  # held by whoever ends this process, or parts with the others
        self.connections: dict[int, socket.socket] = {}
        try:
            if process == 0:
                self._gather(port)
            else:
                self._join(host, port)
        except OSError as error:
            there = (
                f"{1 + len(self.connections)} of {processes} processes came" if not process else "no process 0 answers"
            )
            raise InputError(f"--distribute: {there} at {host}:{port} within {PATIENCE} s ({error})") from None
        for number, connection in self.connections.items():
            keep_alive(connection)
            threading.Thread(target=self._watch, args=(number, connection), daemon=True).start()

    def _gather(self, port: int) -> None:
        deadline = time.monotonic() + PATIENCE
        with socket.create_server(("", port)) as server:
            while len(self.connections) < self.processes - 1:
                server.settimeout(max(0.1, deadline - time.monotonic()))
                with contextlib.ExitStack() as stack:  # closes the connection, unless all is well
                    connection = stack.enter_context(server.accept()[0])
                    connection.settimeout(SILENCE)
                    greeting = connection.recv(len(self._greeting()), socket.MSG_WAITALL)
                    connection.settimeout(None)
                    number = int.from_bytes(greeting[:4], "big")
                    if not 0 < number < self.processes or number in self.connections:
                        raise InputError(f"--distribute: a second process {number}, or not one of {self.processes}")
                    if greeting[4:] != self._greeting()[4:]:
                        raise InputError(f"--distribute: process {number} was started with other flags than process 0")
                    self.connections[number] = connection
                    stack.pop_all()

    def _greeting(self) -> bytes:
        """Number and flags of this process."""
        return self.process.to_bytes(4, "big") + hashlib.sha256(repr(sys.argv[1:]).encode()).digest()

    def _join(self, host: str, port: int) -> None:
        connection = patiently_connect(host, port)
        connection.sendall(self._greeting())
        self.connections[0] = connection

    def coordinator(self, host: str, port: int) -> str:
        """Where JAX in this process finds its coordinator, which is in process 0.

        The others find it through this one: JAX aborts with a page of native code in the moment that a connection to
        the coordinator is closed, and has no way to be told otherwise. So when process 0 ends, JAX is not told.
        """
        if not self.process:
            return f"{host}:{port}"
        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._forward, args=(server, host, port), daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    def _forward(self, server: socket.socket, host: str, port: int) -> None:
        while True:
            near, _ = server.accept()
            far = patiently_connect(host, port)
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=pump, args=(source, target), daemon=True).start()

    def _watch(self, number: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            for line in lines:
                if line == BYE:
                    return
                if line in (GO, READY):
                    self.arrived.release()
                else:
                    self._stop_too(line.decode().strip())
        self._stop_too(f"process {number} of {self.processes} has ended or cannot be reached any more")

    def _stop_too(self, reason: str) -> None:
        if self.over.acquire(blocking=False):
            advice = f"Start {command.again()} on all of them: it goes on from the last checkpoint."
            self._end(reason, f"{reason}\nSo process {self.process} stops too. {advice}", InputError.exit_code)

    def _end(self, reason: str, message: str, code: int) -> None:
        """Ends this process at once: its main thread may wait for ever in the middle of a step, or in JAX's own end."""
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{' '.join(reason.split())}\n".encode())
        sys.stdout.flush()
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        os._exit(code)

    def fail(self, error: BaseException) -> None:
        """Ends this process for an error, and the others with it."""
        complaint = command.complaint(error)
        if not complaint:
            time.sleep(NOTICE)  # an error of JAX because another is gone: `_watch` is about to say so
        with self.over:
            message, code = complaint or ("".join(traceback.format_exception(error)), 1)
            reason = f"process {self.process} of {self.processes} has ended: {complaint[0] if complaint else error!r}"
            self._end(reason, message, code)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        for connection in self.connections.values() if self.process else ():
            connection.sendall(READY)
        for _ in self.connections:
            self.arrived.acquire()
        for connection in self.connections.values() if not self.process else ():
            connection.sendall(GO)

    def leave(self) -> None:
        """Tells the others that this one ends as it should."""
        self.over.acquire()
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(BYE)


# ----------------------------------------------------------------------------------------------------------- one device


class Devices:
    """What trains: here, the one device that Keras takes by itself. The others are made of this."""

    process = 0  # number of this one, from 0
    replicas = 1  # devices among which the rows of a step are shared, of all processes together

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes, reports, and goes on after training."""
        return self.process == 0

    def wait(self) -> None:
        """Returns when all processes have come here."""

    @contextlib.contextmanager
    def trainer(
        self, model: keras.Model, train: "Batches", validation: "Batches | None"
    ) -> Iterator[tuple[keras.Model, Any, Any, list[keras.callbacks.Callback]]]:
        """A model to compile and fit here, and the batches to fit it to.

        Yields:
            The model to fit; training and validation batches for it; callbacks that come before any that reads the
            weights of `model`. Variables of it and of its optimizer take NumPy arrays, the same in all processes, and
            give them.
        """
        yield keras.Model(model.inputs, model.outputs), train, validation, []


ONE = Devices()


def copy_variables(source: keras.Model, target: keras.Model) -> None:
    """Copies all variables, states of random generators among them, to a model of the same structure."""
    for one, other in zip(source.variables, target.variables, strict=True):
        other.assign(keras.ops.convert_to_numpy(one))


class Fed(keras.utils.PyDataset):
    """Batches in another form; the base class."""

    def __init__(self, batches: "Batches") -> None:
        """Takes the batches."""
        super().__init__(batches.workers, use_multiprocessing=False, max_queue_size=batches.max_queue_size)
        self.batches = batches

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.batches)

    def on_epoch_end(self) -> None:
        """Draws the order of the next epoch."""
        self.batches.on_epoch_end()


class BringBack(keras.callbacks.Callback):
    """Copies what is trained into the model that is kept, after every epoch."""

    def __init__(self, kept: keras.Model) -> None:
        """Takes the model."""
        super().__init__()
        self.kept = kept

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Copies."""
        copy_variables(self.model, self.kept)


# ----------------------------------------------------------------------------------------------------------- TensorFlow


class MirroredModel(keras.Model):
    """Trains alike however the rows of a step are shared among the replicas; `training.fit` builds it."""

    def _maybe_symbolic_build(self, **_: Any) -> None:
        """Draws no batch to be built from."""

    def compute_loss(self, x: Any = None, *arguments: Any, training: bool = True, **more: Any) -> Any:
        """The replica's mean, as Keras reports it, with the gradient of its share of the mean of all.

        Keras takes the mean of the replicas' means, which is another where their rows differ in number.
        """
        import tensorflow as tf

        loss = super().compute_loss(x, *arguments, training=training, **more)
        context = tf.distribute.get_replica_context()
        if not training or context is None:
            return loss
        rows = tf.cast(tf.shape(x)[0], loss.dtype)
        total = context.all_reduce(tf.distribute.ReduceOp.SUM, rows)
        share = loss * rows * context.num_replicas_in_sync / total
        return share + tf.stop_gradient(loss - share)


class Repeated(Fed):
    """Batches of fewer rows than replicas come once for each: all results are the same, and no replica gets none."""

    def __init__(self, batches: "Batches", replicas: int) -> None:
        """Takes the batches and the number of replicas."""
        super().__init__(batches)
        self.replicas = replicas

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """One batch."""
        batch = self.batches[index]
        return tuple(np.concatenate([one] * self.replicas) for one in batch) if len(batch[0]) < self.replicas else batch


class Mirrored(Devices):
    """The GPUs of this machine, by `tf.distribute.MirroredStrategy`."""

    def __init__(self) -> None:
        """Takes all that TensorFlow sees."""
        import tensorflow as tf

        found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        self.strategy = tf.distribute.MirroredStrategy([device.name for device in found])
        self.replicas = self.strategy.num_replicas_in_sync

    @contextlib.contextmanager
    def trainer(
        self, model: keras.Model, train: "Batches", validation: "Batches | None"
    ) -> Iterator[tuple[keras.Model, Any, Any, list[keras.callbacks.Callback]]]:
        """See `Devices.trainer`.

        Of an epoch's training figures, those of a last batch of fewer rows than replicas count once for each.
        """
        with self.strategy.scope():
            clone = keras.models.clone_model(model)
            for layer in backbones.flat(clone):
                if isinstance(layer, keras.layers.BatchNormalization):
                    layer.synchronized = True  # statistics of all rows of the step
            copy_variables(model, clone)
            trainer = MirroredModel(clone.inputs, clone.outputs)
            yield trainer, Repeated(train, self.replicas), validation and self._evenly(validation), [BringBack(model)]

    def _evenly(self, batches: "Batches") -> "Batches":
        """The same rows, in batches of which each gives every replica some: figures do not depend on their size.

        Raises:
            InputError: there are too few.
        """
        count = len(batches.rows)
        for size in range(batches.batch_size, max(count, batches.batch_size) + 1):
            if min(count, size, count % size or size) >= self.replicas:
                evenly = copy(batches)
                evenly.batch_size = size
                return evenly
        raise InputError(f"--distribute: {count} photographs of validation are fewer than {self.replicas} devices")


# ------------------------------------------------------------------------------------------------------------------ JAX


class Share(Fed):
    """What one process feeds its devices: its part of each batch, filled up with rows that `ShardedModel` cuts off.

    JAX wants as many rows for each device. The batches are of two lengths, as before: `batch_size`, and that of the
    last one, where it is smaller, filled up to the next multiple of the replicas that is not `batch_size`.
    """

    def __init__(self, batches: "Batches", devices: "Sharded") -> None:
        """Takes the batches that all devices together work on."""
        super().__init__(batches)
        self.devices = devices
        self.last = len(batches.rows) % batches.batch_size
        filled = math.ceil(self.last / devices.replicas) * devices.replicas
        self.last_filled = filled + devices.replicas if filled == batches.batch_size else filled

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """The part of a batch that this process feeds."""
        start = index * self.batches.batch_size
        end = min(start + self.batches.batch_size, len(self.batches.rows))
        length = self.batches.batch_size if end - start == self.batches.batch_size else self.last_filled
        own = length // self.devices.processes
        first = min(start + self.devices.process * own, end)
        part = self.batches.part(first, min(first + own, end))
        return tuple(np.concatenate([one, np.zeros((own - len(one), *one.shape[1:]), one.dtype)]) for one in part)


class ShardedModel(keras.Model):
    """Sees the true rows of each batch alone, shared among the devices as far as they go."""

    def share(self, train: Share, validation: Share | None, rows: Any) -> "ShardedModel":
        """Notes what the batches are like, and the JAX sharding of `rows`."""
        self.of_step, self.rows = {"train": train, "test": validation}, rows
        return self

    def _true(self, data: Any, share: Share | None) -> Any:
        import jax

        assert share
        if len(data[0]) == share.batches.batch_size:
            return data
        return tuple(jax.lax.with_sharding_constraint(one[: share.last], self.rows) for one in data)

    def train_step(self, state: Any, data: Any) -> Any:
        """Keras' own on the true rows."""
        return super().train_step(state, self._true(data, self.of_step["train"]))

    def test_step(self, state: Any, data: Any) -> Any:
        """Keras' own on the true rows."""
        return super().test_step(state, self._true(data, self.of_step["test"]))


class Sharded(Devices):
    """All devices of one or more processes, by `keras.distribution` on JAX."""

    def __init__(self, peers: Peers | None) -> None:
        """Takes the devices of this process, and of the others, where there are some."""
        self.peers = peers
        self.process, self.processes = (peers.process, peers.processes) if peers else (0, 1)
        self.distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
        self.replicas = self.distribution.device_mesh.devices.size

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.peers:
            self.peers.wait()

    def agree(self, model: keras.Model) -> None:
        """Gives a model the weights that process 0 has."""
        if self.peers:
            from jax.experimental import multihost_utils

            self.wait()  # none waits in a collective operation for one that is at something long
            model.set_weights([np.asarray(one) for one in multihost_utils.broadcast_one_to_all(model.get_weights())])

    @contextlib.contextmanager
    def trainer(
        self, model: keras.Model, train: "Batches", validation: "Batches | None"
    ) -> Iterator[tuple[keras.Model, Any, Any, list[keras.callbacks.Callback]]]:
        """See `Devices.trainer`.

        Raises:
            InputError: the rows of a batch cannot be shared evenly.
        """
        if train.batch_size % self.replicas:
            raise InputError(f"--batch-size {train.batch_size} is not a multiple of {self.replicas}, the devices")
        self.agree(model)
        rows = self.distribution.get_data_layout((train.batch_size,)).backend_layout
        own_train, own_validation = Share(train, self), Share(validation, self) if validation else None
        with self.distribution.scope():
            clone = keras.models.clone_model(model)
            copy_variables(model, clone)
            trainer = ShardedModel(clone.inputs, clone.outputs).share(own_train, own_validation, rows)
            yield trainer, own_train, own_validation, [BringBack(model)]


# ---------------------------------------------------------------------------------------------------------------- which


def setting(name: str, form: str) -> re.Match[str]:
    """One of Keras' environment variables.

    Raises:
        InputError: it is missing, or has another form.
    """
    found = re.fullmatch(form, os.environ.get(PREFIX + name, ""))
    if not found:
        raise InputError(f"--distribute: {PREFIX}{name} is {os.environ.get(PREFIX + name, 'not set')}{HELP}")
    return found


@contextlib.contextmanager
def devices(distribute: bool) -> Iterator[Devices]:
    """The devices of a training; before JAX is used for anything else. At the end the processes part.

    Args:
        distribute: whether to use all GPUs of this machine, and of those that Keras' environment variables name; on
            JAX without GPUs, all CPU devices. Otherwise one.

    Raises:
        InputError: the backend cannot, or the others do not come.
    """
    if not distribute:
        yield ONE
        return
    backend = keras.backend.backend()
    several = PREFIX + "NUM_PROCESSES" in os.environ
    processes = int(setting("NUM_PROCESSES", NUMBER)[0]) if several else 1
    if backend not in ("tensorflow", "jax"):
        raise InputError(f"--distribute works on TensorFlow and JAX, not on {backend}: set KERAS_BACKEND=jax")
    if backend == "tensorflow":
        if processes > 1:
            raise InputError("--distribute: several machines work on JAX alone: set KERAS_BACKEND=jax")
        yield Mirrored()
        return
    if processes == 1:
        yield Sharded(None)
        return
    with together(processes) as peers:
        if peers.process:
            command.log.setLevel(logging.WARNING)
        yield Sharded(peers)


@contextlib.contextmanager
def together(processes: int) -> Iterator[Peers]:
    """Joins the processes that Keras' environment variables name, and parts them."""
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
