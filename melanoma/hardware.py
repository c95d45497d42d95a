"""The machine that computes: its memory, and what its accelerator cannot do, in words that help.

Every Keras backend; none is imported before it is needed.
"""

import ctypes
import platform
import re

from melanoma.errors import InputError

ON_CPU = "on the CPU (CUDA_VISIBLE_DEVICES=-1 before the command)"
ELSEWHERE = f"compute with JAX (pip install -r requirements-jax.txt; KERAS_BACKEND=jax before the command), or {ON_CPU}"
MEMORY = "not enough memory for these settings"
ADVICE = {
    # The status of TensorFlow and JAX; TensorFlow's on a CPU; PyTorch's on a GPU and on a CPU.
    "resource_?exhausted|oom when allocating|out of memory|can't allocate memory": (
        f"{MEMORY}: try a smaller --batch-size or --network-size, or compute {ON_CPU}"
    ),
    # Of CUDA, by TensorFlow and PyTorch: the library was built without code for this GPU.
    "no kernel image is available|cuda_error_(no_binary_for_gpu|invalid_ptx|unsupported_ptx_version)": (
        f"the Keras backend has no code for this GPU: {ELSEWHERE}"
    ),
}

# glibc's mallopt (man 3 mallopt). TensorFlow and PyTorch on a CPU free and request their large arrays at every step;
# glibc gives them back to the system each time, and faulting the pages in again took 40 % of the time.
MALLOC = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_ARENA_MAX": (-8, 1)}


def keep_memory() -> None:
    """Lets this process keep what it has freed: a step of unet at 160 pixels took 0.58 s in place of 0.95 to 1.4.

    Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in MALLOC.values():
            ctypes.CDLL(None).mallopt(parameter, value)


def advice(error: BaseException) -> str | None:
    """What to do about an error that comes of the machine; None where it does not.

    The backends' errors have no class in common, so they are known by name and text.
    """
    if isinstance(error, MemoryError):
        return MEMORY
    said = f"{type(error).__name__}: {error}"
    return next((words for pattern, words in ADVICE.items() if re.search(pattern, said, re.IGNORECASE)), None)


def without_gpu() -> bool:
    """Whether the Keras backend sees CPUs alone."""
    import keras

    return all(device.startswith("cpu") for device in keras.distribution.list_devices())


def check() -> None:
    """Refuses a GPU that is too new for this TensorFlow, which would fail in the middle or compile for half an hour.

    Raises:
        InputError: it is.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    built = tf.sysconfig.get_build_info().get("cuda_compute_capabilities", [])  # sm_89, compute_90
    known = max((int(re.sub(r"\D", "", one)) // 10 for one in built), default=None)
    for gpu in tf.config.list_physical_devices("GPU"):
        major, minor = tf.config.experimental.get_device_details(gpu).get("compute_capability") or (0, 0)
        if known is not None and major > known:
            raise InputError(
                f"TensorFlow {tf.__version__} has no code for GPUs of compute capability {major}.{minor}, as "
                f"{gpu.name} is: {ELSEWHERE}"
            )
