"""How fast the networks train and predict: our loop beside the bare step, and DenseNet121 beside PyTorch's.

Every way runs in a process of its own, on drawn photographs of 256 pixels and random weights; the ways take turns.

bare       the step alone, on one batch that is in memory already
loop       `training.fit` as the scripts call it: arrays on disk, random variants of every photograph
predict    `training.predict` by Keras or OpenVINO, or PyTorch alone
           PyTorch comes twice: as it is installed, and with the C library keeping freed memory, as ours always does
head       densenet_train.py --train head, from its start to the fitted head; with --data

Prints     images per second, the share of the loop's time that is not the bare step's, and peak memory of each process

Run     pip install -r benchmarks/requirements-torch.txt
        python benchmarks/training.py
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.cli import flags, hardware
from melanoma.dataset.batches import Batches
from melanoma.inference import openvino
from melanoma.inference.predict import predict
from melanoma.models import losses, segmentation
from melanoma.training import checkpoints, loop

import numpy as np  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SIZE = 256  # pixels: side of the photographs
BATCH = 16
WARM_UP = 2  # steps, or photographs to predict for, that compile and are not counted
EPOCHS = 3  # of the loop, after one that compiles; the bare step is measured before and after
CLASSES = 3
KERAS, TORCH, TORCH_KEEPING = "Keras", "PyTorch", "PyTorch keeping memory"
FLOAT, HALF = "float32", "bfloat16"
POLICIES = {FLOAT: "float32", HALF: "mixed_bfloat16"}  # of Keras
RIVALS = [(library, precision) for library in (TORCH, TORCH_KEEPING) for precision in (FLOAT, HALF)]
TRAINED = [(KERAS, network, precision) for network in ("segnet", "densenet121") for precision in (FLOAT, HALF)]
TRAINED += [(library, "densenet121", precision) for library, precision in RIVALS]
OPENVINO = "OpenVINO"  # by `training.predict`
PREDICTED = [(KERAS, FLOAT), (OPENVINO, FLOAT), (OPENVINO, HALF), *RIVALS]
HEAD = ("--train", "head", "--weights", "none", "--batch-size", "256", "--precision", POLICIES[HALF], "--no-tta")


def photographs(count: int) -> np.ndarray:
    """Random pixels, uint8 (N, SIZE, SIZE, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def rate(work: Callable[[], Any], images: int) -> float:
    """Images per second of some work."""
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------- the ways, in own processes


def train_keras(network: str, precision: str, steps: int, kept: bool) -> dict[str, float]:
    """Images per second of the bare step and of the loop."""
    from melanoma import classifier

    import keras

    class Timed(Batches):
        """Notes when epochs end."""

        ends: list[float] = []  # noqa: RUF012

        def on_epoch_end(self) -> None:
            super().on_epoch_end()
            self.ends.append(time.perf_counter())

    keras.config.set_dtype_policy(POLICIES[precision])
    masks, count = network == "segnet", BATCH * steps
    loss: Any
    metric: Any
    targets: np.ndarray
    if masks:
        design = segmentation.Design(network, 192, mean=[128.0] * 3, std=[60.0] * 3)
        model, loss, metric = segmentation.build(design, SIZE), losses.dice_cross_entropy, losses.jaccard
        targets = np.zeros((count, SIZE, SIZE, 1), np.uint8)
        targets[:, 64:192, 64:192] = 1
    else:
        net = classifier.build(network, SIZE, "none")
        for layer in net.backbone.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = not kept
        model, loss = net.model, "categorical_crossentropy"
        metric = keras.metrics.AUC(multi_label=True, num_labels=CLASSES, name="auc")
        targets = np.eye(CLASSES, dtype=np.float32)[np.arange(count) % CLASSES]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photographs.npy"
        np.save(path, photographs(count))
        inputs: np.ndarray = np.load(path, mmap_mode="r")
        trainer = keras.Model(model.inputs, model.outputs)
        trainer.compile("adam", loss=loss, metrics=[metric])
        batch = keras.ops.convert_to_tensor(inputs[:BATCH]), keras.ops.convert_to_tensor(targets[:BATCH])

        def step(times: int) -> None:
            for _ in range(times):
                trainer.train_on_batch(*batch)

        step(WARM_UP)
        before = rate(lambda: step(steps), count)
        loop.fit(
            model,
            looping := Timed(inputs, targets, BATCH, seed=0, augment=True, target_is_mask=masks),
            None,
            loss=loss,
            metrics=[metric],
            monitor="jaccard" if masks else "auc",
            epochs=1 + EPOCHS,
            learning_rate=1e-4,
            ema=0.0,
            patience=1 + EPOCHS,
            checkpoint=checkpoints.Checkpoint(Path(folder) / "state.npz", {}),
            draw=lambda *_: None,
        )
        bare = statistics.mean([before, rate(lambda: step(steps), count)])
    return {"bare": bare, "loop": EPOCHS * count / (looping.ends[-1] - looping.ends[-1 - EPOCHS])}


def torch_network(kept: bool) -> Any:
    """MONAI's DenseNet121 in the memory layout that is fastest on a CPU."""
    import torch
    from monai.networks.nets import DenseNet121

    net = DenseNet121(spatial_dims=2, in_channels=3, out_channels=CLASSES).to(memory_format=torch.channels_last).train()
    for layer in net.modules() if kept else ():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval().requires_grad_(False)
    return net


def torch_batch(count: int) -> Any:
    """Photographs for it, 0 to 1."""
    import torch

    pixels = torch.from_numpy(photographs(count)).permute(0, 3, 1, 2).float() / 255
    return pixels.contiguous(memory_format=torch.channels_last)


def train_torch(precision: str, steps: int, kept: bool) -> dict[str, float]:
    """Images per second of the bare step."""
    import torch

    net, images = torch_network(kept), torch_batch(BATCH)
    labels = torch.arange(BATCH) % CLASSES
    optimizer = torch.optim.Adam([weight for weight in net.parameters() if weight.requires_grad])

    def step(times: int) -> None:
        for _ in range(times):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == HALF):
                loss = torch.nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()

    step(WARM_UP)
    return {"bare": rate(lambda: step(steps), BATCH * steps)}


def predict_keras(library: str, precision: str, count: int) -> dict[str, float]:
    """Images per second of `training.predict`; the conversion of the network for OpenVINO is not counted."""
    from melanoma import classifier

    import keras

    keras.config.set_dtype_policy(POLICIES[precision])
    network = classifier.build("densenet121", SIZE, "none").model
    images = photographs(count)
    openvino.LEAST_VIEWS = sys.maxsize if library == KERAS else 0
    list(predict([network], images[:BATCH], BATCH, "first"))
    found = predict([network], images, BATCH, "again")
    if library == OPENVINO and not found.inference.name.startswith(openvino.OPENVINO):
        print(f"not measured: {found.inference.reason}", file=sys.stderr)
        return {}
    return {"predict": rate(lambda: list(found), count)}


def predict_torch(precision: str, count: int) -> dict[str, float]:
    """Images per second."""
    import torch

    net, images = torch_network(False).eval(), torch_batch(BATCH)

    def predict(times: int) -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == HALF):
            for _ in range(times):
                net(images)

    predict(WARM_UP)
    return {"predict": rate(lambda: predict(count // BATCH), count)}


def fit_head(data: Path) -> dict[str, float]:
    """Seconds from the start of densenet_train.py to a fitted head, and how many photographs it saw."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arrays").mkdir()
        shutil.copy(data / "manifest.json", folder)
        for array in (data / "arrays").glob("*.npy"):
            if "features" not in array.name:
                (folder / "arrays" / array.name).symlink_to(array.resolve())
        store = Store(folder, contract.CLASSIFIER, {})
        images = sum(store.rows(split) for split in ("train", "val"))
        words = [sys.executable, contract.CLASSIFIER, "--data", str(folder), "--graphics", str(folder), *HEAD]
        start = time.perf_counter()
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not store.path("head_weights", backbone="densenet121", member="").exists():
                time.sleep(0.05)
            seconds = time.perf_counter() - start
            process.terminate()
    if process.returncode not in (0, 128 + signal.SIGTERM):
        sys.exit("densenet_train.py failed")
    return {"seconds": seconds, "images": images}


def work(words: list[str], steps: int, count: int, kept: bool) -> None:
    """Does one way and prints what it found."""
    kind, library, *rest = words
    if library == TORCH_KEEPING:
        hardware.keep_memory()  # as melanoma.training does
    if kind == "head":
        found = fit_head(Path(rest[0]))
    elif kind == "train":
        network, precision = rest
        is_ours = library == KERAS
        found = train_keras(network, precision, steps, kept) if is_ours else train_torch(precision, steps, kept)
    else:
        is_rival = (library, *rest) in RIVALS
        found = predict_torch(rest[0], count) if is_rival else predict_keras(library, rest[0], count)
    print(json.dumps(found | {"peak": hardware.peak_memory()}))


# ------------------------------------------------------------------------------------------------------- the comparison


def measure(way: tuple[str, ...], arguments: argparse.Namespace) -> dict[str, float]:
    """What one way finds in a process of its own."""
    words = [sys.executable, __file__, "--steps", str(arguments.steps), "--images", str(arguments.images)]
    words += ["--keep-normalisation"] * arguments.keep_normalisation + ["--way", *way]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(way)}: failed\n{done.stdout}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace) -> None:
    """Measures every way in turns and prints medians."""
    ways: list[tuple[str, ...]] = [("train", *way) for way in TRAINED] + [("predict", *way) for way in PREDICTED]
    ways += [("head", KERAS, str(arguments.data))] if arguments.data else []
    ways = [way for way in ways if not arguments.only or arguments.only in " ".join(way)]
    found: dict[tuple[str, ...], list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(arguments.rounds):
        for way in ways:
            found[way].append(measure(way, arguments))
            told = ", ".join(f"{name} {value:.2f}" for name, value in found[way][-1].items())
            print(f"round {turn + 1}, {' '.join(way)}: {told}", file=sys.stderr)
    print(f"\nImages per second at {SIZE} pixels, batches of {BATCH}; medians of {arguments.rounds} rounds\n")
    print(f"{'':44}{'bare':>8}{'loop':>8}{'waits':>8}{'predict':>9}{'peak GiB':>10}")
    middle = {
        way: {name: statistics.median(one[name] for one in each) for name in each[0]} for way, each in found.items()
    }
    for way, one in middle.items():
        ratio = [each["loop"] / each["bare"] for each in found[way] if "loop" in each]
        waits = f"{1 - statistics.median(ratio):.3f}" if ratio else ""
        columns = [f"{one[name]:.2f}" if name in one else "" for name in ("bare", "loop")]
        predicted = f"{one['predict']:.1f}" if "predict" in one else ""
        print(f"{', '.join(way):44}{columns[0]:>8}{columns[1]:>8}{waits:>8}{predicted:>9}{one['peak']:>10.2f}")

    for each in (found[way] for way in ways if way[0] == "head"):
        seconds, images = (statistics.median(one[name] for one in each) for name in ("seconds", "images"))
        print(f"\ndensenet_train.py {' '.join(HEAD)}: {seconds:.1f} s to the head, {images:.0f} photographs")
        for library in (TORCH, TORCH_KEEPING):
            if rival := middle.get(("predict", library, FLOAT)):
                print(f"{library} in float32, features alone: {images / rival['predict']:.1f} s")


def main() -> None:
    """Reads the command line; a child process does one way, the parent compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--steps", type=flags.positive_int, default=8, help="of a block of training")
    parser.add_argument("--images", type=flags.positive_int, default=256, help="to predict for")
    parser.add_argument("--rounds", type=flags.positive_int, default=3, help="times that each way is measured")
    parser.add_argument("--data", type=Path, help="where the first three scripts have run: fits a head there too")
    parser.add_argument("--only", help="ways whose name holds this, for example 'train Keras segnet'")
    parser.add_argument(
        "--keep-normalisation",
        action="store_true",
        help="DenseNet121's batch normalisation stays as it is, as densenet_train.py trains pretrained backbones",
    )
    parser.add_argument("--way", nargs="+", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.way:
        work(arguments.way, arguments.steps, arguments.images, arguments.keep_normalisation)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
