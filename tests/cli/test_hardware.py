"""Memory, devices, and advice on the errors that they cause."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from melanoma.cli import hardware, locking
from melanoma.errors import InputError

import keras
import psutil
import pytest

H100 = "NVIDIA H100 80GB HBM3"
on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow is not the backend")


# --------------------------------------------------------------------------------------------------------------- memory


def test_peak_memory_counts_what_is_freed_again() -> None:
    code = (
        "import numpy as np; from melanoma.cli import hardware; before = hardware.peak_memory()\n"
        "array = np.ones((256, 1 << 20), np.uint8); del array; print(hardware.peak_memory() - before)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert 0.2 < float(done.stdout) < 0.3  # of 0.25 GiB


def test_peak_memory_on_windows_is_the_peak_working_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "STATUS", tmp_path / "status")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(
        psutil.Process, "memory_info", lambda _: SimpleNamespace(_asdict=lambda: {"peak_wset": 3 * 2**30})
    )
    assert hardware.peak_memory() == 3


def test_peak_memory_on_macos_is_that_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "STATUS", tmp_path / "status")
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=2 * 2**30))
    monkeypatch.setitem(sys.modules, "resource", usage)
    assert hardware.peak_memory() == 2


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5368709120 bytes."),
            "--batch-size or --input-size",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."), "--batch-size or --input-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), "--batch-size"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "KERAS_BACKEND=jax"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "requirements/jax.txt"),
        (RuntimeError("INTERNAL: CUDA_ERROR_NO_BINARY_FOR_GPU"), "CUDA_VISIBLE_DEVICES=-1"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_error_of_the_hardware_is_recognised_by_its_words(error: Exception, words: str) -> None:
    assert words in (hardware.advice(error) or "")


def test_other_errors_get_no_advice() -> None:
    assert hardware.advice(ValueError("shapes (2, 3) and (4, 3) differ")) is None


# -------------------------------------------------------------------------------------------------------------- devices


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], None]:
    """Lets TensorFlow see GPUs with the given details."""
    import tensorflow as tf

    def show(details: list[dict[str, Any]]) -> None:
        devices = [SimpleNamespace(name=f"GPU:{number}", **detail) for number, detail in enumerate(details)]
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: devices)
        monkeypatch.setattr(tf.config.experimental, "get_device_details", vars)

    return show


@on_tensorflow
@pytest.mark.parametrize(("capability", "refused"), [((8, 0), False), ((9, 5), False), ((10, 0), True), (None, False)])
def test_gpu_that_is_too_new_for_tensorflow_is_refused(
    capability: tuple[int, int] | None,
    refused: bool,
    gpus: Callable[[list[dict[str, Any]]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tensorflow as tf

    built = {"cuda_compute_capabilities": ["sm_80", "compute_90"]}
    monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: built)
    gpus([{"compute_capability": capability}])
    if refused:
        with pytest.raises(
            InputError, match=r"capability 10\.0: compute with JAX \(pip install -r requirements/jax.txt"
        ):
            hardware.check()
    else:
        hardware.check()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Runs log_device without the user's choice of devices, and returns what it logs."""
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", f"{locking.PREFIX}NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(hardware.joblib, "cpu_count", lambda: 2)
    caplog.set_level(logging.INFO, logger="melanoma")

    def messages() -> list[str]:
        hardware.log_device()
        return caplog.messages

    return messages


def use_backend(monkeypatch: pytest.MonkeyPatch, name: str, devices: list[str]) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: name)
    monkeypatch.setattr(hardware, "accelerators", lambda backend: devices if backend == name else [])


def test_cpu_is_logged_with_its_cores(logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, "tensorflow", [])
    assert logged() == ["device: CPU, 2 cores (tensorflow)"]


def test_gpus_are_logged_by_name(logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, "jax", [f"GPU {H100}", f"GPU {H100}"])
    monkeypatch.setattr(hardware, "has_nvidia_gpu", lambda: True)
    assert logged() == [f"device: GPU {H100}, GPU {H100} (jax)"]


@pytest.mark.parametrize(("backend", "file"), [("tensorflow", "gpu.txt"), ("jax", "jax.txt")])
def test_gpu_that_the_backend_does_not_see_is_a_warning_with_advice(
    backend: str, file: str, logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, backend, [])
    monkeypatch.setattr(hardware, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    device, warning = logged()
    assert device == f"device: CPU, 2 cores ({backend})"
    assert warning.startswith(f"warning: this machine has an NVIDIA GPU, but {backend} does not see it")
    assert f"pip install -r requirements/{file}" in warning and "WSL2" not in warning


def test_warning_names_wsl_on_windows(logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, "tensorflow", [])
    monkeypatch.setattr(hardware, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Install WSL2, and in it TensorFlow with CUDA" in logged()[1]


@pytest.mark.parametrize(
    ("name", "value"), [("CUDA_VISIBLE_DEVICES", "-1"), ("CUDA_VISIBLE_DEVICES", ""), ("JAX_PLATFORMS", "cpu")]
)
def test_user_who_chose_the_cpu_is_not_warned(
    name: str, value: str, logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, "tensorflow", [])
    monkeypatch.setattr(hardware, "has_nvidia_gpu", lambda: True)
    monkeypatch.setenv(name, value)
    assert logged() == ["device: CPU, 2 cores (tensorflow)"]


def test_jax_is_not_started_before_the_processes_of_a_job_are_connected(
    logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: str) -> list[str]:
        raise AssertionError("JAX was started")

    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    monkeypatch.setattr(hardware, "accelerators", start)
    monkeypatch.setenv(f"{locking.PREFIX}NUM_PROCESSES", "2")
    assert logged() == []


@on_tensorflow
def test_tensorflow_names_its_gpus(gpus: Callable[[list[dict[str, Any]]], None]) -> None:
    gpus([{"device_name": H100}, {}])
    assert hardware.accelerators("tensorflow") == [f"GPU {H100}", "GPU GPU:1"]


def test_jax_names_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [SimpleNamespace(platform="gpu", device_kind=H100), SimpleNamespace(platform="cpu", device_kind="cpu")]
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(devices=lambda: devices))
    assert hardware.accelerators("jax") == [f"GPU {H100}"]


# ---------------------------------------------------------------------------------------------------------- NVIDIA GPUs


def fake_nvidia_smi(folder: Path, script: str) -> None:
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)


@pytest.mark.parametrize(
    ("driver", "script", "found"),
    [
        (["0000:0f:00.0"], None, True),
        ([], None, False),
        (None, None, False),
        (None, f'test "$1" = -L && echo "GPU 0: {H100} (UUID: GPU-1)"', True),
        (None, "echo No devices found.; exit 6", False),
        (None, "echo NVIDIA-SMI has failed because it could not communicate with the driver.; exit 9", False),
        (None, "exec /does/not/exist", False),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvidia-smi is a shell script")
def test_nvidia_gpu_is_found_by_its_driver_or_by_nvidia_smi(
    driver: list[str] | None, script: str | None, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in driver or []:
        (tmp_path / "gpus" / folder).mkdir(parents=True)
    if driver == []:
        (tmp_path / "gpus").mkdir()
    if script:
        fake_nvidia_smi(tmp_path, script)
    monkeypatch.setattr(hardware, "NVIDIA_GPUS", tmp_path / "gpus")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.has_nvidia_gpu() == found


def test_hanging_nvidia_smi_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(hardware, "NVIDIA_GPUS", tmp_path / "gpus")
    monkeypatch.setattr(hardware.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(hardware.subprocess, "run", hang)
    assert not hardware.has_nvidia_gpu()
