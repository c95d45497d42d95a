"""The hardware that computes: memory, devices, and advice on errors that they cause."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from melanoma.cli import locking
from melanoma.errors import InputError
from melanoma.log import log

import joblib
import psutil

STATUS = Path("/proc/self/status")  # of this process, on Linux

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder per GPU, where Linux has NVIDIA's driver

USE_CPU = "compute on the CPU (CUDA_VISIBLE_DEVICES=-1 before the command)"
USE_JAX = "compute with JAX (pip install -r requirements/jax.txt; KERAS_BACKEND=jax before the command)"
INSTALL = {
    "tensorflow": "TensorFlow with CUDA (pip install -r requirements/gpu.txt)",
    "jax": "JAX with CUDA (pip install -r requirements/jax.txt)",
}

MEMORY = "not enough memory for these settings"
ADVICE = {
    # TensorFlow and JAX; TensorFlow on a CPU; PyTorch on a GPU and on a CPU.
    "resource_?exhausted|oom when allocating|out of memory|can't allocate memory": (
        f"{MEMORY}: try a smaller --batch-size or --input-size, or {USE_CPU}"
    ),
    # CUDA, through TensorFlow and PyTorch: the library was built without code for this GPU.
    "no kernel image is available|cuda_error_(no_binary_for_gpu|invalid_ptx|unsupported_ptx_version)": (
        f"the Keras backend has no code for this GPU: {USE_JAX}, or {USE_CPU}"
    ),
}

# Parameters of glibc's mallopt (man 3 mallopt): M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX. By default glibc returns the
# large arrays of every training step to the system; page faults at the next step took 40 % of the time.
MALLOPT = {-4: 0, -1: 2**31 - 1, -8: 1}


def keep_memory() -> None:
    """Lets this process keep freed memory: a step of unet at 160 pixels took 0.58 s instead of 0.95 to 1.4 s.

    Has no effect where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in MALLOPT.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def peak_memory() -> float:
    """Peak resident memory of this process in GiB."""
    if STATUS.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return int(peak[1]) / 2**20  # not `resource`, which counts the parent's memory at the start of the process too
    try:
        import resource
    except ImportError:
        return psutil.Process().memory_info()._asdict()["peak_wset"] / 2**30  # Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def advice(error: BaseException) -> str | None:
    """Advice on an error that the hardware caused, recognised by its name and text; None for other errors."""
    if isinstance(error, MemoryError):
        return MEMORY
    raised = f"{type(error).__name__}: {error}"
    return next((text for pattern, text in ADVICE.items() if re.search(pattern, raised, re.IGNORECASE)), None)


def without_gpu() -> bool:
    """Whether the Keras backend sees only CPUs."""
    import keras

    return all(device.startswith("cpu") for device in keras.distribution.list_devices())


def check() -> None:
    """Refuses a GPU that is too new for this TensorFlow: training would fail, or compile for half an hour.

    Raises:
        InputError: the GPU's compute capability is above those that TensorFlow was built for.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    built_for = tf.sysconfig.get_build_info().get("cuda_compute_capabilities", [])  # such as sm_89, compute_90
    newest = max((int(re.sub(r"\D", "", capability)) // 10 for capability in built_for), default=None)
    for gpu in tf.config.list_physical_devices("GPU"):
        major, minor = tf.config.experimental.get_device_details(gpu).get("compute_capability") or (0, 0)
        if newest is not None and major > newest:
            raise InputError(
                f"TensorFlow {tf.__version__} has no code for {gpu.name}, a GPU of compute capability {major}.{minor}: "
                f"{USE_JAX}, or {USE_CPU}"
            )


def log_device() -> None:
    """Logs which devices the Keras backend computes on; warns if it does not see an NVIDIA GPU of this machine."""
    import keras

    backend = keras.backend.backend()
    if backend == "jax" and f"{locking.PREFIX}NUM_PROCESSES" in os.environ:
        return  # JAX may start only after the processes of the job are connected
    if gpus := accelerators(backend):
        log.info("device: %s (%s)", ", ".join(gpus), backend)
        return
    log.info("device: CPU, %d cores (%s)", joblib.cpu_count(), backend)
    if has_nvidia_gpu() and not cpu_requested():
        log.warning(
            "warning: this machine has an NVIDIA GPU, but %s does not see it and computes on the CPU. Install %s%s, or "
            "set CUDA_VISIBLE_DEVICES=-1 if you want the CPU",
            backend,
            "WSL2, and in it " if sys.platform == "win32" else "",  # neither backend supports GPUs on Windows itself
            INSTALL.get(backend, INSTALL["jax"]),
        )


def accelerators(backend: str) -> list[str]:
    """Names of the GPUs and TPUs that a Keras backend computes on, such as "GPU NVIDIA H100 80GB HBM3"."""
    if backend == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        return [f"GPU {detail.get('device_name', gpu.name)}" for gpu, detail in zip(gpus, details, strict=True)]
    if backend == "jax":
        import jax

        return [
            f"{device.platform.upper()} {device.device_kind}" for device in jax.devices() if device.platform != "cpu"
        ]
    import torch

    return [f"GPU {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]


def has_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU in this machine."""
    if NVIDIA_GPUS.is_dir() and any(NVIDIA_GPUS.iterdir()):
        return True
    if not (command := shutil.which("nvidia-smi")):
        return False
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.startswith("GPU ")


def cpu_requested() -> bool:
    """Whether the user's environment hides the GPUs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("JAX_PLATFORMS") == "cpu"
