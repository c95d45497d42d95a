"""Predicts new images with trained networks: masks, calibrated probabilities, overlays and a page.

Reads   IMAGE ..., image files and folders, searched with all folders below; masks among them are left out
        pretrained/, or with --data the networks that the scripts trained
Writes  predictions/predictions.csv               one line per image: probabilities, melanoma yes or no at each
                                                  operating point, what to check, the file
        predictions/submission.csv                the probabilities alone, as the tools of the challenges want them
        predictions/failed.csv                    images that cannot be read, and why
        predictions/masks/{name}_segmentation.png lesion mask at the image's own size, 0 and 255
        predictions/overlays/{name}.png           contour, crop, Grad-CAM and probabilities
        predictions/report.html                   all images on one page, sortable
        predictions/settings.json                 what the results depend on; the same command resumes a run

Run     python predict.py my_images
Expect  docs/prediction.md
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from melanoma.classes import CLASSES, MELANOMA
from melanoma.cli import flags, hardware, run
from melanoma.dataset.workers import Workers
from melanoma.deployment import images, page, pipeline
from melanoma.deployment.images import Broken, Read
from melanoma.deployment.pipeline import Pipeline
from melanoma.deployment.results import FAILED, Results
from melanoma.errors import InputError
from melanoma.log import log, progress

WRITES = ("out",)
BLOCK = 128  # images in memory at a time; with fewer for each network OpenVINO would not be used


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image file or folder of images")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder of the results")
    pipeline.add_flags(parser)
    parser.add_argument(
        "--overlays", action=argparse.BooleanOptionalAction, default=True, help="draw an overlay of each image"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    parser.add_argument(
        "--jobs", type=flags.positive_int, help="threads that read and draw images; default: one per core"
    )
    return parser


def predict(
    read: Iterator[Read | Broken], networks: Pipeline, results: Results, overlays: bool, workers: Workers
) -> Iterator[Read | Broken]:
    """Predicts images, a block at a time; yields each of them when its results are written."""
    while block := list(itertools.islice(read, BLOCK)):
        readable = [one for one in block if isinstance(one, Read)]
        results.add(networks.find(readable, overlays), workers)
        yield from block


def main(arguments: argparse.Namespace) -> None:
    """Predicts the images that have no results yet, a block at a time, then writes the page.

    Raises:
        InputError: no images, or at the end: some cannot be read.
    """
    found = images.find(arguments.images, [arguments.out])
    hardware.check()
    networks = pipeline.load(arguments.data, arguments.views, arguments.backbone)
    results = Results(arguments.out, networks.thresholds[CLASSES[MELANOMA]])
    results.open({**networks.made_of, "overlays": arguments.overlays}, arguments.overwrite)
    todo = results.without_line(found)
    log.info("%d images, %d of them predicted by an earlier run", len(found), len(found) - len(todo))
    log.info("%s", networks.describe())
    failed: list[Broken] = []
    with images.workers_for(len(todo), arguments.jobs) as workers:
        handled = predict(images.read_all(todo, networks.size, workers), networks, results, arguments.overlays, workers)
        for one in progress(handled, "predicting", len(todo)):
            if isinstance(one, Broken):
                failed.append(one)
        results.write_failed(failed)
        results.write_submission()
        written = page.write(
            results, {"networks": networks.describe(), "failed": [one.file.name for one in failed]}, workers
        )
    log.info("results: %s", written)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(found)} images could not be read (see {arguments.out / FAILED}), e.g. "
            f"{failed[0].file.path}: {failed[0].reason}"
        )


if __name__ == "__main__":
    run.run(build_parser(), main, writes=WRITES)
