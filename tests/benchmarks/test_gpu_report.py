"""The report of a GPU: real measurements at toy size on the CPU, and what becomes of those that fail or do not fit."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_report, gpu_results, training
from benchmarks.gpu_report import ALL, Job
from melanoma.cli import hardware
from melanoma.errors import InputError

import pytest

# Stands for Python: lists packages, or "measures". U-Net crashes; DenseNet121 trains, then hangs in a child of its own.
STAND_IN = """
import json, subprocess, sys, time
words = sys.argv[1:]
if words[0] == "-c":
    print(json.dumps({"tensorflow": "2.99", "keras": "3.99", "pip": "1"}))
elif "unet" in words:
    sys.exit("first line\\nValueError: shapes (2, 3) | (4, 3) differ")
else:
    print("Epoch 1/5")
    print(json.dumps({"step": 1234.5, "loop": 99.94, "start": 61.0, "devices": 1, "gpu_peak": 7.25}), flush=True)
    if "densenet121" in words:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(json.dumps({"child": child.pid}), flush=True)
        child.wait()
    print(json.dumps({"predict": 5000.0}))
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """The path of the stand-in."""
    script, command = tmp_path / "stand_in.py", tmp_path / "python"
    script.write_text(STAND_IN, encoding="utf-8")
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    command.chmod(0o755)
    return str(command)


def report(folder: Path, *words: str) -> tuple[list[dict[str, Any]], str]:
    """The measurements of a report, and its tables."""
    gpu_report.main(gpu_report.build_parser().parse_args(["--out", str(folder), *words]))
    found = json.loads((folder / "gpu-report.json").read_text(encoding="utf-8"))
    return found["measurements"], (folder / "gpu-report.md").read_text(encoding="utf-8")


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in table.splitlines() if line.startswith("| ")]


# ----------------------------------------------------------------------------------------------------- what is measured


def test_every_combination_is_measured_mixed_precision_first() -> None:
    jobs = gpu_report.list_jobs(gpus=1)
    assert len(jobs) == len(set(jobs)) == 3 * 2 * 2 + 2 * 2 + 2
    assert jobs[:2] == [Job("TensorFlow", "densenet121", "bfloat16"), Job("JAX", "densenet121", "bfloat16")]
    networks = [job.precision for job in jobs if job.what != gpu_results.CHAIN]
    assert networks == sorted(networks)  # bfloat16, then float32
    assert [job.library for job in jobs if job.what == gpu_results.CHAIN] == ["TensorFlow", "JAX"]
    assert {job.what for job in jobs if job.library in gpu_report.TORCH} == {"densenet121"}


def test_several_gpus_train_every_network_together_too() -> None:
    added = set(gpu_report.list_jobs(gpus=2)) - set(gpu_report.list_jobs(gpus=1))
    assert len(added) == 3 * 2 * 2 and {job.gpus for job in added} == {ALL}


@pytest.mark.parametrize(("visible", "first"), [(None, "0"), ("3,1", "3")])
def test_one_gpu_is_the_first_that_is_visible(visible: str | None, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    one, several = Job("JAX", "unet"), Job("JAX", "unet", gpus=ALL)
    assert one.environment(toy=False) == {"KERAS_BACKEND": "jax", "CUDA_VISIBLE_DEVICES": first}
    assert several.environment(toy=False) == {"KERAS_BACKEND": "jax"}


def test_on_a_gpu_nothing_is_measured_on_the_cpu_by_mistake() -> None:
    jobs = [job for job in gpu_report.list_jobs(gpus=2) if job.what != gpu_results.CHAIN]
    for job in jobs:
        assert "--need-gpu" in job.words("python", Path(), toy=False)
        assert ("--distribute" in job.words("python", Path(), toy=False)) == (job.gpus == ALL)


def test_benchmark_refuses_a_library_that_does_not_see_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "accelerators", lambda _: [])
    words = Job("TensorFlow", "segnet").words("python", Path(), toy=False)
    monkeypatch.setattr(sys, "argv", words[2:])
    with pytest.raises(SystemExit, match="does not see the GPU"):
        training.main()


def test_machine_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_nvidia_gpu", lambda: False)
    with pytest.raises(InputError, match=r"no NVIDIA GPU here.*CPU=1"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- measurements that fail


def test_crash_leaves_a_row_with_its_reason_and_the_others_are_measured(python: str, tmp_path: Path) -> None:
    found, table = report(tmp_path, "--cpu", "--python", python, "--only", "net bfloat16 1")
    reasons = {(one["library"], one["what"]): one.get("reason") for one in found}
    assert reasons == {
        ("TensorFlow", "unet"): "failed (exit code 1): ValueError: shapes (2, 3) | (4, 3) differ",
        ("TensorFlow", "segnet"): None,
        ("JAX", "unet"): "not measured: JAX is not installed",
        ("JAX", "segnet"): "not measured: JAX is not installed",
    }
    heading, _, crashed, _, measured, _ = rows(table)
    assert heading[:4] == ["network", "precision", "library", "GPUs"]
    assert crashed == [
        *("unet", "bfloat16", "TensorFlow", "1"),
        *["not measured"] * 5,
        "failed (exit code 1): ValueError: shapes (2, 3) \\| (4, 3) differ",
    ]
    assert measured == ["segnet", "bfloat16", "TensorFlow", "1", "1234", "99.9", "5000", "7.2", "61.0", ""]
    segnet = next(one for one in found if (one["library"], one["what"]) == ("TensorFlow", "segnet"))
    assert segnet["exit_code"] == 0 and "seconds" in segnet
    assert segnet["command"].startswith("KERAS_BACKEND=tensorflow CUDA_VISIBLE_DEVICES=-1 JAX_PLATFORMS=cpu ")


def test_measurement_that_hangs_is_stopped_with_what_it_started_and_keeps_what_it_measured(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "LEAST", 0)
    words = ("--cpu", "--python", python, "--only", "TensorFlow densenet121 bfloat16 1", "--minutes", "0.1")
    (one,), table = report(tmp_path, *words)
    assert one["exit_code"] is None and one["reason"] == "stopped after 2 s"
    assert (one["step"], "predict" in one) == (1234.5, False)
    assert rows(table)[2][4:7] == ["1234", "99.9", "not measured"]
    assert not is_alive(one["child"])


def is_alive(process: int) -> bool:
    """Whether a process runs, half a second after it was killed."""
    time.sleep(0.5)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] != "Z"


def test_what_does_not_fit_into_the_time_is_named_and_not_started(python: str, tmp_path: Path) -> None:
    found, _ = report(tmp_path, "--cpu", "--python", python, "--only", "TensorFlow", "--minutes", "0.1")
    assert len(found) == 3 * 2 * 2 + 1
    assert {one["reason"] for one in found} == {"not measured: no time left"}
    assert not any("command" in one for one in found)


def test_each_library_runs_in_the_first_python_that_has_it(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "measure", lambda job, python, *_: {"command": python, "seconds": 0})
    versions = {"a": {"jax": "1"}, "b": {"jax": "1", "keras": "3"}, "c": {"jax": "2", "keras": "3", "torch": "2"}}
    monkeypatch.setattr(gpu_report, "list_versions", versions.get)
    found, _ = report(tmp_path, "--cpu", "--python", "a", "b", "c", "--only", "densenet121 bfloat16 1")
    assert {one["library"]: one.get("command", one.get("reason")) for one in found} == {
        "TensorFlow": "not measured: TensorFlow is not installed",
        "JAX": "b",
        "PyTorch compiled": "not measured: PyTorch is not installed",  # without MONAI
        "PyTorch": "not measured: PyTorch is not installed",
    }


def test_chain_on_the_cpu_of_a_machine_with_a_gpu_is_named(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_report, "execute", lambda *_: gpu_results.read(0, 1.0, "device: CPU, 2 cores (jax)\n{cut off", "")
    )
    monkeypatch.setattr(gpu_results, "mean_auc", lambda _: 0.9)
    found = gpu_report.measure(Job("JAX", gpu_results.CHAIN), python, 1, toy=False)
    assert found["reason"] == "computed on the CPU: the backend does not see the GPU"


def test_last_words_of_make_are_not_the_reason() -> None:
    errors = "step.py: InputError of the script\nmake[1]: *** [Makefile:1: chain] Error 2\nmake: *** Error 2\n\n"
    assert gpu_results.read(2, 1.0, "", errors)["reason"] == "failed (exit code 2): step.py: InputError of the script"
    assert gpu_results.last_line("") == "no message"


# ---------------------------------------------------------------------------------------------------- real measurements


@pytest.mark.slow
@pytest.mark.parametrize(
    ("only", "devices", "speeds"),
    [
        ("TensorFlow unet bfloat16 1", 1, {"step", "loop", "predict"}),
        ("JAX segnet float32 1", 1, {"step", "loop", "predict"}),
        ("JAX segnet bfloat16 all", 2, {"step", "loop"}),
    ],
)
def test_network_is_measured_on_the_cpu(only: str, devices: int, speeds: set[str], tmp_path: Path) -> None:
    (one,), table = report(tmp_path, "--cpu", "--only", only)
    assert "reason" not in one, one
    assert one["devices"] == devices
    assert {name for name in ("step", "loop", "predict") if one.get(name, 0) > 0} == speeds
    assert one["seconds"] > one["start"] > 0 and one["peak"] > 0 and "gpu_peak" not in one
    assert rows(table)[2][3] == str(devices)


@pytest.mark.slow
def test_chain_is_measured_on_the_cpu(tmp_path: Path) -> None:
    (one,), table = report(tmp_path, "--cpu", "--only", f"JAX {gpu_results.CHAIN}")
    assert "reason" not in one, one
    assert one["device"].endswith("(jax)") and 0 <= one["auc"] <= 1
    assert rows(table)[2][:3] == ["JAX", gpu_results.number(one["seconds"]), f"{one['auc']:.3f}"]


@pytest.mark.slow
def test_pytorch_is_measured_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    (one,), _ = report(tmp_path, "--cpu", "--only", "PyTorch densenet121 bfloat16")
    assert "reason" not in one, one
    assert one["step"] > 0 and one["predict"] > 0
