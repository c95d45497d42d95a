"""One command for a GPU: speed of training and prediction, and the chain on synthetic images, within ten minutes.

Every measurement runs in processes of its own, the most important first: networks by `benchmarks.training`, on random
pixels with random weights, and the five scripts by `make chain`. One that fails leaves a row that says why.

Writes     gpu-report.json    machine, versions; of each measurement command, results, seconds, and why one is missing
           gpu-report.md      the same as tables for docs/results.md

Run        make gpu-report
Try        python -m benchmarks.gpu_report --cpu --only "JAX segnet"
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_results
from benchmarks.gpu_results import CHAIN, NOT_MEASURED
from melanoma.artifacts.atomic import write_json, write_text
from melanoma.cli import flags, hardware, run
from melanoma.errors import InputError
from melanoma.log import log

import joblib

BACKENDS = {"TensorFlow": "tensorflow", "JAX": "jax", "PyTorch compiled": "torch", "PyTorch": "torch"}  # by library
KERAS, TORCH = ("TensorFlow", "JAX"), ("PyTorch compiled", "PyTorch")
NETWORKS = ("densenet121", "unet", "segnet")
PRECISIONS = ("bfloat16", "float32")
ONE, ALL = "1", "all"  # GPUs

ON_GPU = {"size": 256, "batch-size": 32, "steps": 100, "images": 2048}  # flags of `benchmarks.training`
TOY = {"size": 32, "batch-size": 4, "steps": 2, "images": 8}
TOY_FLAGS = "--input-size 32 --epochs 1 --views 1"
TOY_CHAIN = ("SAMPLE=--train 24 --val 12 --test 12", "SIZE=32", f"SEGMENTATION={TOY_FLAGS}", f"TRAINING={TOY_FLAGS}")
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
TWO_CPUS = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}  # of JAX: stand for two GPUs

LIMIT = 1 / 3  # of the time that there is: what one measurement may take
LEAST = 15  # seconds: with less time left no measurement is started
REPORTED = ("tensorflow", "jax", "torch", "monai", "keras", "numpy")  # packages
VERSIONS = (
    "from importlib.metadata import *; import json; print(json.dumps({d.name: d.version for d in distributions()}))"
)
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


@dataclass(frozen=True)
class Job:
    """A measurement."""

    library: str  # of BACKENDS
    what: str  # of NETWORKS, or CHAIN
    precision: str = "float32"
    gpus: str = ONE

    def __str__(self) -> str:
        """For messages and --only."""
        return f"{self.library} {self.what} {self.precision} {self.gpus}"

    def needs(self) -> set[str]:
        """Packages."""
        return {"keras", BACKENDS[self.library], *(["monai"] if self.library in TORCH else [])}

    def words(self, python: str, folder: Path, toy: bool) -> list[str]:
        """The command; the chain leaves its files in `folder`."""
        if self.what == CHAIN:
            return ["make", "chain", f"RUN={python}", f"DEMO={folder}", *(TOY_CHAIN if toy else ())]
        library = "Keras" if self.library in KERAS else self.library
        method = ("both" if self.gpus == ONE else "train", library, self.what, self.precision)
        sizes = [word for name, value in (TOY if toy else ON_GPU).items() for word in (f"--{name}", str(value))]
        switches = ["--distribute"] * (self.gpus == ALL) + ["--need-gpu"] * (not toy)
        return [python, "-m", "benchmarks.training", "--method", *method, *sizes, *switches]

    def environment(self, toy: bool) -> dict[str, str]:
        """Environment variables to set."""
        backend = {"KERAS_BACKEND": BACKENDS[self.library]}
        if toy:
            return backend | CPU_ONLY | (TWO_CPUS if self.gpus == ALL else {})
        first, *_ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
        return backend | ({"CUDA_VISIBLE_DEVICES": first} if self.gpus == ONE else {})


def list_jobs(gpus: int) -> list[Job]:
    """All measurements on a machine with so many GPUs, the most important first."""
    jobs = []
    for precision, chained in zip(PRECISIONS, KERAS, strict=True):
        for network in NETWORKS:
            compared = TORCH if network == "densenet121" else ()
            jobs += [Job(library, network, precision) for library in (*KERAS, *compared)]
            jobs += [Job(chained, CHAIN)] * bool(compared)
        several = NETWORKS if gpus > 1 else ()
        jobs += [Job(library, network, precision, ALL) for network in several for library in KERAS]
    return jobs


def list_gpus() -> list[str]:
    """Name, driver and memory of each NVIDIA GPU, as many as CUDA_VISIBLE_DEVICES shows."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return found if visible is None else found[: len(visible.split(","))]
    return ["a GPU that nvidia-smi does not describe"]


def list_versions(python: str) -> dict[str, str]:
    """Version of each of REPORTED that a Python interpreter has."""
    found = json.loads(subprocess.run([python, "-c", VERSIONS], stdout=subprocess.PIPE, check=True).stdout)
    return {name: found[name] for name in REPORTED if name in found}


def execute(words: Sequence[str], environment: dict[str, str], limit: float, folder: Path) -> dict[str, Any]:
    """Runs a command for at most `limit` seconds; see `gpu_results.read`."""
    start, output, errors = time.monotonic(), folder / "stdout", folder / "stderr"
    with output.open("w") as out, errors.open("w") as err:  # pipes would stay open while any grandchild lives
        process = subprocess.Popen(words, env=os.environ | environment, stdout=out, stderr=err, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)
            code = process.returncode
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it started
            process.wait()
    seconds = round(time.monotonic() - start, 1)
    return gpu_results.read(code, seconds, output.read_text(errors="replace"), errors.read_text(errors="replace"))


def measure(job: Job, python: str, limit: float, toy: bool) -> dict[str, Any]:
    """Command and results of a measurement; of the chain also the mean AUC of the test images."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        chain, environment = Path(name) / "chain", job.environment(toy)
        words = job.words(python, chain, toy)
        found = execute(words, environment, limit, Path(name))
        if job.what == CHAIN and found["exit_code"] == 0:
            found["auc"] = gpu_results.mean_auc(chain / "graphics" / "metrics.json")
    if not toy and found.get("device", "").startswith("CPU"):
        found.setdefault("reason", "computed on the CPU: the backend does not see the GPU")
    return {"command": shlex.join([*(f"{name}={value}" for name, value in environment.items()), *words]), **found}


def main(arguments: argparse.Namespace) -> None:
    """Measures until the time is up, and writes the report after every measurement."""
    toy, start, limit = arguments.cpu, time.monotonic(), 60 * arguments.minutes
    if not toy and (not hardware.has_nvidia_gpu() or hardware.cpu_requested()):
        raise InputError(
            "there is no NVIDIA GPU here, or CUDA_VISIBLE_DEVICES or JAX_PLATFORMS hides it; make gpu-report CPU=1 "
            "(--cpu) tries everything on the CPU, at toy size"
        )
    gpus, versions = [] if toy else list_gpus(), {python: list_versions(python) for python in arguments.python}
    machine = {"gpus": gpus, "cores": joblib.cpu_count(), "system": platform.platform(), "versions": versions}
    report = {"machine": machine, "toy": toy, "sizes": TOY if toy else ON_GPU, "measurements": []}
    blind = set[str]()  # libraries
    for job in [job for job in list_jobs(2 if toy else len(gpus)) if arguments.only in str(job)]:
        left = start + limit - time.monotonic()
        python = next((python for python, found in versions.items() if job.needs() <= set(found)), None)
        if not python:
            found = {"reason": f"{NOT_MEASURED}: {job.library.split()[0]} is not installed"}
        elif left < LEAST:
            found = {"reason": f"{NOT_MEASURED}: no time left"}
        elif job.what == CHAIN and job.library in blind:
            found = {"reason": f"{NOT_MEASURED}: {job.library} does not see the GPU"}
        else:
            found = measure(job, python, min(left, LIMIT * limit), toy)
        blind |= {job.library} if "does not see the GPU" in found.get("reason", "") else set()
        log.info("%s: %s", job, found.get("reason") or f"measured in {found['seconds']:.0f} s")
        report["measurements"].append(asdict(job) | found)
        write_json(arguments.out / "gpu-report.json", report)
        write_text(arguments.out / "gpu-report.md", gpu_results.render(report))
    log.info("\n%s", gpu_results.render(report))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--cpu", action="store_true", help="at toy size on the CPU, to try the command")
    parser.add_argument("--minutes", type=flags.positive_float, default=10.0, help="time for all measurements")
    parser.add_argument("--only", default="", help="measurements whose name contains this, for example 'JAX segnet'")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the report")
    parser.add_argument(
        "--python",
        nargs="+",
        default=[sys.executable],
        help="Python interpreters; each library runs in the first that has it, because they need different CUDA",
    )
    return parser


if __name__ == "__main__":
    run.run(build_parser(), main, writes=())
