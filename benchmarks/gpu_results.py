"""The results of `benchmarks.gpu_report`: read from what a command printed, and as Markdown for docs/results.md."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHAIN = "five scripts"  # in the place of a network
DEVICE = "device: "  # how the scripts log what they compute on
NOT_MEASURED = "not measured"
VALUES = {
    "step": "training step only, images/s",
    "loop": "`training.fit`, with augmentation, images/s",
    "predict": "prediction, images/s",
    "gpu_peak": "peak GPU memory, GiB",
    "start": "start and compilation, s",
}
NETWORK_COLUMNS = ("network", "precision", "library", "GPUs", *VALUES.values(), "note")
CHAIN_COLUMNS = ("library", "seconds", "mean AUC, synthetic test images", "note")


def read(code: int | None, seconds: float, output: str, errors: str) -> dict[str, Any]:
    """Results of a command, also of one that failed later.

    Args:
        code: exit code; None: it was stopped.
        seconds: how long it ran.
        output: what it printed; lines of JSON are results.
        errors: what it printed to standard error.
    """
    found: dict[str, Any] = {"exit_code": code, "seconds": seconds}
    for line in output.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line may be cut off
            found |= json.loads(line) if line.startswith("{") else {}
        found |= {"device": line.removeprefix(DEVICE)} if line.startswith(DEVICE) else {}
    if code is None:
        found["reason"] = f"stopped after {seconds:.0f} s"
    elif code:
        found["reason"] = f"failed (exit code {code}): {last_line(errors)}"
    return found


def last_line(errors: str) -> str:
    """The last line of error messages that says something; `make` adds one that does not."""
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not line.startswith("make")]
    return lines[-1][:300] if lines else "no message"


def mean_auc(path: Path) -> float:
    """Mean AUC of the test images in the metrics.json of the chain."""
    (system,) = json.loads(path.read_text(encoding="utf-8"))["systems"].values()
    return system["splits"]["test"]["metrics"]["mean auc"]


def render(report: Mapping[str, Any]) -> str:
    """Two tables, of the networks and of the chain, and what they were measured on and with.

    Args:
        report: the content of gpu-report.json.
    """
    machine, sizes = report["machine"], report["sizes"]
    versions = [", ".join(f"{name} {version}" for name, version in one.items()) for one in machine["versions"].values()]
    lines = [
        f"{'; '.join(machine['gpus']) or 'No GPU, toy size'}; {machine['cores']} CPU cores; {'; '.join(versions)}.",
        f"{sizes['size']} pixels (SegNet and U-Net: at most 192 inside), batches of {sizes['batch-size']} per GPU, "
        f"{sizes['steps']} steps per epoch, random weights, batch normalisation is trained.",
        "PyTorch: MONAI's DenseNet121, channels last. float32 as the libraries compute it by default.",
        "",
    ]
    networks = [one for one in report["measurements"] if one["what"] != CHAIN]
    chains = [one for one in report["measurements"] if one["what"] == CHAIN]
    lines += table(NETWORK_COLUMNS, [network_row(one) for one in networks]) if networks else []
    lines += table(CHAIN_COLUMNS, [chain_row(one) for one in chains]) if chains else []
    return "\n".join(lines)


def table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    rows = [list(columns), ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [*(f"| {' | '.join(row)} |" for row in rows), ""]


def network_row(one: Mapping[str, Any]) -> list[str]:
    """Cells of the measurement of a network."""
    gpus = str(one.get("devices", one["gpus"]))
    values = [number(one[name]) if name in one else NOT_MEASURED for name in VALUES]
    return [one["what"], one["precision"], one["library"], gpus, *values, one.get("reason", "")]


def chain_row(one: Mapping[str, Any]) -> list[str]:
    """Cells of a run of the chain."""
    auc = f"{one['auc']:.3f}" if "auc" in one else NOT_MEASURED
    return [one["library"], number(one["seconds"]) if "auc" in one else NOT_MEASURED, auc, one.get("reason", "")]


def number(value: float) -> str:
    """A number with about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
