"""Speed and memory of step 1, compared with its version of 2018, other libraries, and decoding only.

Reads   --source, full-size images and masks of the official validation split, repeated under new ids
Prints  images per second of each method, ratios, and peak memory of all its processes together

Run     pip install -r requirements.txt
        python -m benchmarks.preprocessing --source isic2017_fullres
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import segmentation_01_preprocessing as step_1
from melanoma.classes import MELANOMA, NEVUS
from melanoma.cli import flags
from melanoma.sources import reader
from melanoma.sources.layouts import challenge_2017
from melanoma.sources.records import Record

import cv2
import numpy as np
import psutil
from PIL import Image

SIZE = 256  # pixels: side of the arrays
SLOW_IMAGES = 22  # for the method that takes seconds per image
SAMPLING_INTERVAL = 0.1  # seconds between two measurements of memory; psutil scans all processes each time
STEP_1, STEP_1_COPIES, STEP_1_TWO_JOBS = "step 1, 1 job", "step 1, 1 job, 2 copies", "step 1, 2 jobs"
OF_2018, OF_2018_NO_COPIES, SCIKIT_IMAGE = "2018", "2018, no copies", "scikit-image"
DECODING = "decoding only"
ON_ONE_CORE = {
    STEP_1: "all of step 1 without augmented copies: checks, search for duplicates, arrays",
    STEP_1_COPIES: "the same with two augmented copies per image",
    OF_2018: "OpenCV: full decode, cubic resize; rotated and sheared copies at full size; lists of floats",
    OF_2018_NO_COPIES: "its decode and resize only",
    SCIKIT_IMAGE: "imread and antialiased resize, the image only",
    f"{DECODING}, Pillow": "scaled decode of the image and decode of the mask, nothing else",
    f"{DECODING}, OpenCV": "the same with OpenCV",
    f"{DECODING}, kornia": "the same with Pillow, masks with kornia-rs",
}

Pairs = list[tuple[Path, Path]]  # of an image and its mask


def write_source(folder: Path, originals: list[Record], count: int, label: int) -> None:
    """A train split of `count` links that cycle through the originals, all with the same label."""
    images, masks = challenge_2017.image_folder(folder, "train"), challenge_2017.mask_folder(folder, "train")
    images.mkdir(parents=True)
    masks.mkdir()
    lines = ["image_id,melanoma,seborrheic_keratosis"]
    for number in range(count):
        record, name = originals[number % len(originals)], f"ISIC_{number:07d}"
        assert record.mask
        (images / f"{name}.jpg").symlink_to(record.image.resolve())
        (masks / f"{name}_segmentation.png").symlink_to(record.mask.resolve())
        lines.append(f"{name},{float(label == MELANOMA)},0.0")
    challenge_2017.label_file(folder, "train").write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------- the methods, each in a process of its own


def run_step_1(source: Path, jobs: int, copies: int) -> None:
    """Step 1; `copies` as in its --copies: 1 makes none."""
    with tempfile.TemporaryDirectory() as folder:
        places = ["--data", f"{folder}/data", "--graphics", f"{folder}/graphics", "--source", str(source)]
        options = ["--keep-duplicates", "--jobs", str(jobs), "--copies", str(copies), "--size", str(SIZE)]
        step_1.main(step_1.build_parser().parse_args([*places, *options]))


def step_1_of_2018(pairs: Pairs, copies: bool) -> None:
    """Full decoding, cubic resizing, a rotated and a sheared copy made at full size, all kept as floats."""
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for image, mask in pairs:
        for path, flag, kept in ((image, cv2.IMREAD_COLOR, images), (mask, cv2.IMREAD_GRAYSCALE, masks)):
            original = np.asarray(cv2.imread(str(path), flag))
            height, width = original.shape[:2]
            pictures = [original]
            if copies:
                rotation = cv2.getRotationMatrix2D((width / 2, height / 2), 30, 1)
                shear = np.array([[1, 0.2, 0], [0, 1, 0]])
                pictures += [cv2.warpAffine(original, matrix, (width, height)) for matrix in (rotation, shear)]
            for picture in pictures:
                small = cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
                kept.append(small.astype(np.float32) / 255)


def resize_with_scikit_image(pairs: Pairs) -> None:
    """Decoding and antialiased resizing, images only."""
    from skimage import io, transform

    for image, _ in pairs:
        transform.resize(io.imread(image), (SIZE, SIZE), anti_aliasing=True)


def decode_scaled(path: Path) -> None:
    """Decodes an image with Pillow at the smallest scale of at least SIZE pixels."""
    with Image.open(path) as image:
        image.draft("RGB", (SIZE, SIZE))
        image.load()


def decode_with_pillow(pairs: Pairs) -> None:
    """Scaled decoding of images, decoding of masks."""
    for image, mask in pairs:
        decode_scaled(image)
        with Image.open(mask) as opened:
            opened.load()


def decode_with_kornia(pairs: Pairs) -> None:
    """Scaled decoding of images with Pillow, decoding of masks with kornia-rs."""
    import kornia_rs

    for image, mask in pairs:
        decode_scaled(image)
        kornia_rs.io.read_image_png_u8(str(mask), "mono")


def decode_with_opencv(pairs: Pairs) -> None:
    """Scaled decoding of images, decoding of masks."""
    modes = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
    for image, mask in pairs:
        with Image.open(image) as opened:
            side = min(opened.size)
        scale = max((scale for scale in modes if side // scale >= SIZE), default=1)
        cv2.imread(str(image), modes.get(scale, cv2.IMREAD_COLOR))
        cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE)


def run_method(name: str, source: Path) -> None:
    """Runs a method in this process and prints its seconds, without imports."""
    records = reader.read(source).splits["train"]
    pairs = [(record.image, record.mask) for record in records if record.mask]
    methods: dict[str, Callable[[], None]] = {
        STEP_1: functools.partial(run_step_1, source, jobs=1, copies=1),
        STEP_1_COPIES: functools.partial(run_step_1, source, jobs=1, copies=3),
        STEP_1_TWO_JOBS: functools.partial(run_step_1, source, jobs=2, copies=1),
        OF_2018: functools.partial(step_1_of_2018, pairs, copies=True),
        OF_2018_NO_COPIES: functools.partial(step_1_of_2018, pairs, copies=False),
        SCIKIT_IMAGE: functools.partial(resize_with_scikit_image, pairs),
        f"{DECODING}, Pillow": functools.partial(decode_with_pillow, pairs),
        f"{DECODING}, OpenCV": functools.partial(decode_with_opencv, pairs),
        f"{DECODING}, kornia": functools.partial(decode_with_kornia, pairs),
    }
    if name in ON_ONE_CORE:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    start = time.perf_counter()
    methods[name]()
    print(json.dumps(time.perf_counter() - start))


# -------------------------------------------------------------------------------------------------------- comparison


def resident_memory(process: psutil.Process) -> int:
    """Bytes in main memory of a process and its descendants; shared pages count once for each."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss
    return total


def measure(method: str, source: Path) -> tuple[float, float]:
    """Seconds, and peak memory in MiB, of a method in a new process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "benchmarks.preprocessing", "--source", str(source), "--method", method]
    peak, finished = 0, threading.Event()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        watched = psutil.Process(process.pid)

        def watch() -> None:
            nonlocal peak
            while not finished.wait(SAMPLING_INTERVAL):
                peak = max(peak, resident_memory(watched))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            output, _ = process.communicate()
        finally:
            finished.set()
            watcher.join()
    if process.returncode:
        sys.exit(f"{method}: failed\n{output}")
    return float(output.splitlines()[-1]), peak / 2**20


def compare(originals: list[Record], count: int, many: int, rounds: int) -> None:
    """Measures all methods alternately and prints medians.

    Args:
        originals: images with masks, repeated as needed.
        count: images per measurement of speed.
        many: images for the comparison of memory with a tenth of them.
        rounds: measurements per method.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"plain": count, "copies": count, "slow": SLOW_IMAGES, "few": many // 10, "many": many}
        for kind, size in sizes.items():
            write_source(folder / kind, originals, size, MELANOMA if kind == "copies" else NEVUS)
        sources = {SCIKIT_IMAGE: "slow", STEP_1_COPIES: "copies"}
        rates: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        for number in range(1, rounds + 1):
            for method in (*ON_ONE_CORE, STEP_1_TWO_JOBS):
                kind = sources.get(method, "plain")
                seconds, peak = measure(method, folder / kind)
                rates.setdefault(method, []).append(sizes[kind] / seconds)
                peaks[method] = max(peak, peaks.get(method, 0))
                print(f"round {number}, {method}: {sizes[kind] / seconds:.1f} images/s", file=sys.stderr)
        growth = measure(STEP_1, folder / "many")[1] / measure(STEP_1, folder / "few")[1]
    print(f"\n{count} images with masks, {len(originals)} different ones; medians of {rounds} rounds")
    print_tables(rates, peaks)
    print(f"peak memory, {many} images / {many // 10:<5}        {growth:6.2f}")
    print("\n" + "\n".join(f"{method}: {description}" for method, description in ON_ONE_CORE.items()))


def print_tables(rates: dict[str, list[float]], peaks: dict[str, float]) -> None:
    """Prints images per second and peak memory in MiB by method, then ratios of medians."""
    median = {method: statistics.median(found) for method, found in rates.items()}
    print(f"\n{'':26}{'images/s':>9}{'lowest':>9}{'highest':>9}{'peak MiB':>10}")
    for method, found in rates.items():
        print(f"{method:26}{median[method]:9.1f}{min(found):9.1f}{max(found):9.1f}{peaks[method]:10.0f}")
    decoding = max(rate for method, rate in median.items() if method.startswith(DECODING))
    print(f"\nstep 1 with 2 copies / 2018            {median[STEP_1_COPIES] / median[OF_2018]:6.2f}")
    print(f"step 1 / 2018 without copies           {median[STEP_1] / median[OF_2018_NO_COPIES]:6.2f}")
    print(f"step 1 / scikit-image                  {median[STEP_1] / median[SCIKIT_IMAGE]:6.2f}")
    print(f"step 1 / fastest decoding              {median[STEP_1] / decoding:6.2f}")
    print(f"step 1, 2 jobs on two cores / 1 job    {median[STEP_1_TWO_JOBS] / median[STEP_1]:6.2f}")


def main() -> None:
    """A child process, started with --method, runs one method; the parent compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--source", type=Path, required=True, help="folder with the official validation split")
    parser.add_argument("--images", type=flags.positive_int, default=660, help="images, those of the source repeated")
    parser.add_argument(
        "--many", type=flags.positive_int, default=3000, help="images for memory, compared with a tenth of them"
    )
    parser.add_argument("--rounds", type=flags.positive_int, default=3, help="measurements per method")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        run_method(arguments.method, arguments.source)
    else:
        compare(reader.read(arguments.source).splits["val"], arguments.images, arguments.many, arguments.rounds)


if __name__ == "__main__":
    main()
