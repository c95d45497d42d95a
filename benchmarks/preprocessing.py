"""How fast step 1 is, and how much memory it takes: beside the stage of 2018, other libraries, and the bare decoding.

Reads   --source, full-size photographs and masks of the official validation split, repeated under new ids
Prints  images per second of each way, ratios, and peak memory of all its processes together

Run     pip install -r requirements.txt
        python benchmarks/preprocessing.py --source isic2017_fullres
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import segmentation_01_preprocessing as preprocessing  # noqa: E402
from melanoma import command, isic  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

SIZE = 256  # pixels: side of the arrays
SLOW_LIMIT = 22  # images for the way that takes seconds for each
SAMPLE = 0.02  # seconds between two looks at the memory
OURS = "ours"
SINGLE = {
    f"{OURS}, 1 job": "all of step 1 without augmented copies: checks, duplicates, arrays",
    f"{OURS}, 1 job, 2 copies": "the same with two augmented copies of each photograph",
    "2018": "OpenCV: full decode, cubic resize; turn and shear at full size; image and mask, into lists of floats",
    "2018, no copies": "its decode and resize alone",
    "scikit-image": "imread and antialiased resize of the photograph alone",
    "floor, Pillow": "scaled decode of the photograph and decode of the mask, nothing else",
    "floor, OpenCV": "the same with OpenCV",
    "floor, kornia": "the same with Pillow, masks with kornia",
}
DOUBLE = f"{OURS}, 2 jobs"

Pairs = list[tuple[Path, Path]]


def write_source(folder: Path, originals: list[isic.Record], count: int, label: int) -> None:
    """A train split of `count` links to the originals in turns, all of one class."""
    images, masks = isic.image_folder(folder, "train"), isic.mask_folder(folder, "train")
    images.mkdir(parents=True)
    masks.mkdir()
    lines = ["image_id,melanoma,seborrheic_keratosis"]
    for number in range(count):
        record, name = originals[number % len(originals)], f"ISIC_{number:07d}"
        assert record.mask
        (images / f"{name}.jpg").symlink_to(record.image.resolve())
        (masks / f"{name}_segmentation.png").symlink_to(record.mask.resolve())
        lines.append(f"{name},{float(label == isic.MELANOMA)},0.0")
    isic.label_file(folder, "train").write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------------- the ways, in own processes


def ours(source: Path, jobs: int, copies: int) -> None:
    """Step 1 itself."""
    with tempfile.TemporaryDirectory() as folder:
        places = ["--data", f"{folder}/data", "--graphics", f"{folder}/graphics", "--source", str(source)]
        flags = ["--keep-duplicates", "--jobs", str(jobs), "--copies", str(copies), "--size", str(SIZE)]
        preprocessing.main(preprocessing.parser().parse_args([*places, *flags]))


def stage_of_2018(pairs: Pairs, copies: bool) -> None:
    """Full decoding, cubic resize, and a turned and a sheared copy made at full size, all kept as floats."""
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for image, mask in pairs:
        for path, flag, kept in ((image, cv2.IMREAD_COLOR, images), (mask, cv2.IMREAD_GRAYSCALE, masks)):
            picture = np.asarray(cv2.imread(str(path), flag))
            height, width = picture.shape[:2]
            variants = [picture]
            if copies:
                turn = cv2.getRotationMatrix2D((width / 2, height / 2), 30, 1)
                shear = np.array([[1, 0.2, 0], [0, 1, 0]])
                variants += [cv2.warpAffine(picture, matrix, (width, height)) for matrix in (turn, shear)]
            for variant in variants:
                small = cv2.resize(variant, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
                kept.append(small.astype(np.float32) / 255)


def scikit_image(pairs: Pairs) -> None:
    """The photograph alone."""
    from skimage import io, transform

    for image, _ in pairs:
        transform.resize(io.imread(image), (SIZE, SIZE), anti_aliasing=True)


def floor_of_pillow(pairs: Pairs) -> None:
    """The least that must be done."""
    for image, mask in pairs:
        with Image.open(image) as picture, Image.open(mask) as outline:
            picture.draft("RGB", (SIZE, SIZE))
            picture.load()
            outline.load()


def floor_of_kornia(pairs: Pairs) -> None:
    """The least that must be done."""
    import kornia_rs

    for image, mask in pairs:
        with Image.open(image) as picture:
            picture.draft("RGB", (SIZE, SIZE))
            picture.load()
        kornia_rs.io.read_image_png_u8(str(mask), "mono")


def floor_of_opencv(pairs: Pairs) -> None:
    """The least that must be done."""
    scales = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
    for image, mask in pairs:
        with Image.open(image) as picture:
            least = min(picture.size)
        scale = max((scale for scale in scales if least // scale >= SIZE), default=1)
        cv2.imread(str(image), scales.get(scale, cv2.IMREAD_COLOR))
        cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE)


def work(way: str, source: Path) -> None:
    """Does one way in this process and prints its seconds, imports left out."""
    records = isic.read_split(source, "train")
    pairs = [(record.image, record.mask) for record in records if record.mask]
    ways: dict[str, Callable[[], None]] = {
        f"{OURS}, 1 job": lambda: ours(source, 1, 1),
        f"{OURS}, 1 job, 2 copies": lambda: ours(source, 1, 3),
        DOUBLE: lambda: ours(source, 2, 1),
        "2018": lambda: stage_of_2018(pairs, copies=True),
        "2018, no copies": lambda: stage_of_2018(pairs, copies=False),
        "scikit-image": lambda: scikit_image(pairs),
        "floor, Pillow": lambda: floor_of_pillow(pairs),
        "floor, OpenCV": lambda: floor_of_opencv(pairs),
        "floor, kornia": lambda: floor_of_kornia(pairs),
    }
    if way in SINGLE:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    start = time.perf_counter()
    ways[way]()
    print(json.dumps(time.perf_counter() - start))


# ------------------------------------------------------------------------------------------------------- the comparison


def family(pid: int) -> Iterator[int]:
    """A process and all that it started."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def memory(pid: int) -> int:
    """Bytes in main memory of a process and all that it started, shared pages counted each time."""
    pages = 0
    for member in family(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{member}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(way: str, source: Path) -> tuple[float, float]:
    """Seconds, and peak memory in MiB, of one way in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    words = [sys.executable, __file__, "--source", str(source), "--way", way]
    peak, over = 0, threading.Event()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:

        def watch() -> None:
            nonlocal peak
            while not over.wait(SAMPLE):
                peak = max(peak, memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            out, _ = process.communicate()
        finally:
            over.set()
            watcher.join()
    if process.returncode:
        sys.exit(f"{way}: failed\n{out}")
    return float(out.splitlines()[-1]), peak / 2**20


def compare(originals: list[isic.Record], count: int, many: int, rounds: int) -> None:
    """Measures every way `rounds` times in turns and prints medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"plain": count, "copies": count, "slow": SLOW_LIMIT, "few": many // 10, "many": many}
        for kind, size in sizes.items():
            write_source(folder / kind, originals, size, isic.MELANOMA if kind == "copies" else isic.NEVUS)
        rates: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        for turn in range(rounds):
            for way in (*SINGLE, DOUBLE):
                kind = "slow" if way == "scikit-image" else "copies" if "2 copies" in way else "plain"
                seconds, peak = measure(way, folder / kind)
                rates.setdefault(way, []).append(sizes[kind] / seconds)
                peaks[way] = max(peak, peaks.get(way, 0))
                print(f"round {turn + 1}, {way}: {sizes[kind] / seconds:.1f} images/s", file=sys.stderr)
        few, most = (measure(f"{OURS}, 1 job", folder / kind)[1] for kind in ("few", "many"))
    rate = {way: statistics.median(found) for way, found in rates.items()}
    floor = max(value for way, value in rate.items() if way.startswith("floor"))
    print(f"\n{count} photographs with masks, {len(originals)} different ones; medians of {rounds} rounds")
    print(f"\n{'':26}{'images/s':>9}{'lowest':>9}{'highest':>9}{'peak MiB':>10}")
    for way, found in rates.items():
        print(f"{way:26}{rate[way]:9.1f}{min(found):9.1f}{max(found):9.1f}{peaks[way]:10.0f}")
    one = rate[f"{OURS}, 1 job"]
    print(f"\nours with 2 copies / 2018              {rate[f'{OURS}, 1 job, 2 copies'] / rate['2018']:6.2f}")
    print(f"ours / 2018 without copies             {one / rate['2018, no copies']:6.2f}")
    print(f"ours / scikit-image                    {one / rate['scikit-image']:6.2f}")
    print(f"ours / floor                           {one / floor:6.2f}")
    print(f"ours, 2 jobs on two cores / 1 job      {rate[DOUBLE] / one:6.2f}")
    print(f"peak memory, {many} images / {many // 10:<5}        {most / few:6.2f}")
    print("\n" + "\n".join(f"{way}: {what}" for way, what in SINGLE.items()))


def main() -> None:
    """Reads the command line; a child process does one way, the parent compares."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=command.HelpFormatter, allow_abbrev=False)
    flags.add_argument("--source", type=Path, required=True, help="folder with the official validation split")
    flags.add_argument("--images", type=command.positive_int, default=660, help="photographs, the source's repeated")
    flags.add_argument("--many", type=command.positive_int, default=3000, help="memory is compared here and at a tenth")
    flags.add_argument("--rounds", type=command.positive_int, default=3, help="times that each way is measured")
    flags.add_argument("--way", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.way:
        work(arguments.way, arguments.source)
    else:
        compare(isic.read_split(arguments.source, "val"), arguments.images, arguments.many, arguments.rounds)


if __name__ == "__main__":
    main()
