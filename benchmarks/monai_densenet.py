"""DenseNet121 of MONAI in PyTorch, for comparison: its training step and its prediction, on a GPU if there is one.

As fast as PyTorch computes it: channels last, a batch that is on the device already, the fastest algorithms of cuDNN,
TF32 on GPUs that have it, as Keras' backends do by default; optionally compiled.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.networks.nets import DenseNet121

WARM_UP = 2  # batches that compile and are not measured
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

torch.backends.cudnn.benchmark = True
torch.set_float32_matmul_precision("high")


def build(classes: int, compiled: bool, keep_normalisation: bool = False) -> Any:
    """The network in training mode; `keep_normalisation`: with frozen batch normalisation."""
    network = DenseNet121(spatial_dims=2, in_channels=3, out_channels=classes)
    network = network.to(DEVICE, memory_format=torch.channels_last).train()
    for layer in network.modules() if keep_normalisation else ():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval().requires_grad_(False)
    return torch.compile(network) if compiled else network


def prepare(images: np.ndarray) -> Any:
    """A batch on the device: from uint8 (N, S, S, 3) to float32 (N, 3, S, S) in [0, 1]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return pixels.to(DEVICE).contiguous(memory_format=torch.channels_last)


def rate(step: Callable[[], Any], batch_size: int, steps: int) -> float:
    """Images per second of `steps` steps, after WARM_UP others."""
    for _ in range(WARM_UP):
        step()
    synchronise()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise()
    return batch_size * steps / (time.perf_counter() - start)


def synchronise() -> None:
    """Waits for the GPU, which computes while Python goes on."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def train(network: Any, images: np.ndarray, bfloat16: bool, steps: int) -> float:
    """Images per second of the training step on one batch, uint8 (N, S, S, 3)."""
    batch, classes = prepare(images), network.class_layers[-1].out_features
    labels = (torch.arange(len(images)) % classes).to(DEVICE)
    optimizer = torch.optim.Adam([weight for weight in network.parameters() if weight.requires_grad])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bfloat16):
            loss = torch.nn.functional.cross_entropy(network(batch), labels)
        loss.backward()
        optimizer.step()

    return rate(step, len(images), steps)


def predict(network: Any, images: np.ndarray, bfloat16: bool, steps: int) -> float:
    """Images per second of predicting one batch, uint8 (N, S, S, 3), `steps` times."""
    network, batch = network.eval(), prepare(images)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=bfloat16):
        return rate(lambda: network(batch), len(images), steps)


def gpu_peak() -> float | None:
    """Peak memory in GiB that this process used on the GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
