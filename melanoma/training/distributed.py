"""Training on several devices: the GPUs of one machine, or processes on several machines.

TensorFlow: `tf.distribute.MirroredStrategy`, one machine only, because Keras' `fit` fails under its multi-worker
strategy. JAX: `keras.distribution.DataParallel` over all devices of all processes, which find each other through Keras'
environment variables KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and _PROCESS_ID.

The rows of a step are divided among the devices. Loss, gradients and batch normalisation statistics are those of the
whole batch; only the order of summation differs. A last batch that cannot be divided is padded, see `PaddedBatches`.
Process 0 leads: it alone writes files, and it continues alone after training. When a process dies, JAX ends the others.
"""

import contextlib
import hashlib
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from melanoma.cli import locking, run
from melanoma.errors import InputError
from melanoma.log import log
from melanoma.models import backbones, fused_batchnorm
from melanoma.training.batches import Batches, PaddedBatches

import keras
import numpy as np

HEARTBEAT = 10  # seconds without a sign of a process after which JAX ends the others
LINGER = 2  # seconds for which a process that has failed stays, so that the others can report the same error
POLLING = 0.1  # seconds
NUMBER, ADDRESSES = r"\d+", r"([^,]+:\d+)(?:,.*)?"
HELP = "; see docs/distributed.md"
Prepared = tuple[keras.Model, Any, Any, list[keras.callbacks.Callback]]  # see `Devices.trainer`


class Devices:
    """The devices used for training; this base class is the single default device of Keras."""

    process, processes = 0, 1  # index of this process, from 0, and their number
    replicas = 1  # devices among which the rows of a step are divided, over all processes

    @property
    def leads(self) -> bool:
        """Whether this process writes files, logs, and continues after training."""
        return self.process == 0

    def wait(self) -> None:
        """Waits until all processes have reached this point."""

    @contextlib.contextmanager
    def trainer(self, model: keras.Model, train: Batches, validation: Batches | None) -> Iterator[Prepared]:
        """A model to compile and fit on these devices, and the batches to fit it to.

        Yields:
            The model to fit; its training and validation batches; callbacks that must come before any that reads the
            weights of `model`. Variables of the model and its optimizer can be assigned NumPy arrays, the same in all
            processes, and converted to them.

        Raises:
            InputError: the rows of a batch cannot be divided evenly.
        """
        yield keras.Model(model.inputs, model.outputs), train, validation, []


ONE = Devices()


@dataclass
class Parallel(Devices):
    """Several devices; on JAX perhaps of several processes."""

    strategy: Any  # of TensorFlow or Keras, with a `scope` in which models are built
    replicas: int
    process: int = 0
    processes: int = 1
    exchanges: int = 0  # so far

    def exchange(self, value: str) -> set[str]:
        """Waits until all processes have called this; the different values that they gave.

        JAX's own barriers have a time limit, and do not let Ctrl-C through.
        """
        if self.processes == 1:
            return {value}
        from jax._src import distributed  # JAX has no public way to its key-value store

        client: Any = distributed.global_state.client
        self.exchanges += 1
        client.key_value_set(f"melanoma/{self.exchanges}/{self.process}", value)
        while len(found := client.key_value_dir_get(f"melanoma/{self.exchanges}/")) < self.processes:
            time.sleep(POLLING)
        return {one for _, one in found}

    def wait(self) -> None:
        """Waits until all processes have reached this point."""
        self.exchange("here")

    def agree(self, model: keras.Model) -> None:
        """Copies the variables of process 0 into a model of every process."""
        from jax.experimental import multihost_utils

        self.wait()  # so that no process blocks in a collective operation while another does something long
        values = [keras.ops.convert_to_numpy(variable) for variable in model.variables]
        for variable, value in zip(model.variables, multihost_utils.broadcast_one_to_all(values), strict=True):
            variable.assign(np.asarray(value))

    @contextlib.contextmanager
    def trainer(self, model: keras.Model, train: Batches, validation: Batches | None) -> Iterator[Prepared]:
        """See `Devices.trainer`."""
        if train.batch_size % self.replicas:
            raise InputError(f"--batch-size {train.batch_size} is not a multiple of {self.replicas}, the devices")
        part = self.replicas, self.process, self.processes
        padded = PaddedBatches(train, *part), validation and PaddedBatches(validation, *part, for_training=False)
        if self.processes > 1:
            self.agree(model)
        with self.strategy.scope():
            clone = keras.models.clone_model(model)
            for layer in backbones.flatten_layers(clone):
                if isinstance(layer, keras.layers.BatchNormalization):  # on JAX it has the statistics of all rows
                    layer.synchronized = keras.backend.backend() == "tensorflow"
            copy_variables(model, clone)
            trained = PaddedModel(clone.inputs, clone.outputs)
            copy_back = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: copy_variables(trained, model))
            yield trained, *padded, [copy_back]


def copy_variables(source: keras.Model, target: keras.Model) -> None:
    """Copies all variables, including those of random generators, to a model of the same structure."""
    for one, other in zip(source.variables, target.variables, strict=True):
        other.assign(keras.ops.convert_to_numpy(one))
    fused_batchnorm.update_normalization(backbones.flatten_layers(target))


class PaddedModel(keras.Model):
    """A model whose metrics ignore rows of weight 0 and count all others once."""

    def compile(self, *arguments: Any, metrics: list[Any], **options: Any) -> None:
        """As the base class, but metrics get the weights."""
        super().compile(*arguments, weighted_metrics=metrics, **options)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """As the base class, with weights 0 and 1."""
        return super().compute_metrics(x, y, y_pred, keras.ops.sign(sample_weight))

    def _maybe_symbolic_build(self, **_: Any) -> None:
        """Does nothing: `training.loop.fit` builds the model."""


def setting(name: str, form: str) -> re.Match[str]:
    """One of Keras' environment variables.

    Raises:
        InputError: it is not set, or has another format.
    """
    value = os.environ.get(locking.PREFIX + name, "not set")
    if not (found := re.fullmatch(form, value)):
        raise InputError(f"--distribute: {locking.PREFIX}{name} is {value}{HELP}")
    return found


@contextlib.contextmanager
def devices(distribute: bool) -> Iterator[Devices]:
    """The devices used for training. Enter it before any other use of JAX; the processes disconnect at the end.

    Args:
        distribute: whether to use all GPUs of this machine and of the machines in Keras' environment variables (without
            GPUs, all CPU devices); otherwise the default device.

    Raises:
        InputError: the backend does not support it.
    """
    backend = keras.backend.backend()
    several = distribute and locking.PREFIX + "NUM_PROCESSES" in os.environ
    processes = int(setting("NUM_PROCESSES", NUMBER)[0]) if several else 1
    if not distribute:
        yield ONE
    elif backend not in ("tensorflow", "jax"):
        raise InputError(f"--distribute works on TensorFlow and JAX, not on {backend}: set KERAS_BACKEND=jax")
    elif backend == "jax" and processes > 1:
        with together(processes) as all_devices:
            yield all_devices
    elif processes > 1:
        raise InputError("--distribute: several machines need JAX: set KERAS_BACKEND=jax")
    else:
        yield data_parallel() if backend == "jax" else mirrored()


def mirrored() -> Parallel:
    """All GPUs that TensorFlow sees, or else all its logical CPUs."""
    import tensorflow as tf

    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return Parallel(tf.distribute.MirroredStrategy([device.name for device in found]), len(found))


def data_parallel(process: int = 0, processes: int = 1) -> Parallel:
    """All devices that JAX sees, in all processes."""
    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    return Parallel(distribution, distribution.device_mesh.devices.size, process, processes)


@contextlib.contextmanager
def together(processes: int) -> Iterator[Parallel]:
    """Connects the processes named by Keras' environment variables, and disconnects them at the end.

    `keras.distribution.initialize` would leave 100 seconds between the end of a process and that of the others.
    """
    import jax

    process, address = int(setting("PROCESS_ID", NUMBER)[0]), setting("JOB_ADDRESSES", ADDRESSES)[1]
    if process >= processes:
        raise InputError(f"--distribute: {locking.PREFIX}PROCESS_ID is {process}, not below {processes}{HELP}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it ignores SIGTERM
    log.info("waiting for %d processes at %s", processes, address)
    options: Any = {"cluster_detection_method": "deactivate"}  # otherwise JAX uses one GPU of a machine under SLURM
    jax.distributed.initialize(address, processes, process, heartbeat_timeout_seconds=HEARTBEAT, **options)
    try:
        all_devices = data_parallel(process, processes)
        if len(all_devices.exchange(hashlib.sha256(repr(sys.argv[1:]).encode()).hexdigest())) > 1:
            raise InputError("--distribute: the processes were started with flags that differ")
        if process:
            log.setLevel(logging.WARNING)
        yield all_devices
        all_devices.wait()
    except BaseException as error:
        fail(error, f"process {process} of {processes}")
    jax.distributed.shutdown()


def fail(error: BaseException, process: str) -> NoReturn:
    """Ends this process after an error, so that JAX ends the others.

    Python's own exit would run JAX's, which waits for the other processes; they may be waiting for this one.
    """
    message, code = run.user_message(error) or ("".join(traceback.format_exception(error)), 1)
    advice = f"To resume from the last checkpoint, run {run.resume_hint()} on all machines."
    sys.stdout.flush()
    text = f"{Path(sys.argv[0]).name}: {message}\nThis ends {process}, and with it the others. {advice}\n"
    print(text, end="", file=sys.stderr, flush=True)  # in one call: other processes write to the same terminal
    try:
        time.sleep(LINGER)
    finally:  # also after a second Ctrl-C
        os._exit(code)
