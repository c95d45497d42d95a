"""Exports trained networks to ONNX, OpenVINO, LiteRT or SavedModel, for use without Keras and this package.

Reads   pretrained/, or with --data the networks that the scripts trained
        with --check images to compare with Keras
Writes  exported/segmentation.{onnx,xml,tflite}, segmentation_saved_model/
                                  model from images to lesion probabilities
        exported/classifier.{onnx,xml,tflite}, classifier_saved_model/
                                  model from regions of interest to calibrated probabilities of the three classes
        exported/*.bin            weights of OpenVINO
        exported/description.json sizes, thresholds, what lies between the two models, licence, checksums, and the
                                  largest difference from Keras

Run     python export.py --format onnx
Expect  docs/prediction.md#export
"""

import argparse
from pathlib import Path

from melanoma.cli import flags, run
from melanoma.deployment import export, formats, images, pipeline
from melanoma.errors import InputError
from melanoma.inference import pretrained
from melanoma.log import log

import numpy as np

WRITES = ("out",)
COUNT = 50  # images to compare with Keras


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--format", choices=formats.FORMATS, required=True, help="format of the two models")
    parser.add_argument(
        "--precision",
        choices=("float32", "float16"),
        default="float32",
        help="precision of the stored weights; float16 halves the files",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("exported"), help="folder of the models; another one for each format"
    )
    pipeline.add_flags(parser)
    parser.add_argument(
        "--check",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help=f"image files and folders, of which the first {COUNT} are compared with Keras; default: synthetic images",
    )
    return parser


def images_to_check(found: list[images.ImageFile], size: int) -> np.ndarray:
    """The images that are compared, uint8 (N, size, size, 3); synthetic ones if no files are given.

    Raises:
        InputError: none can be read.
    """
    if not found:
        return export.synthetic_images(COUNT, size)
    with images.workers_for(len(found), None) as workers:
        read = list(images.read_all(found, size, workers))
    if readable := [one.image for one in read if isinstance(one, images.Read)]:
        return np.stack(readable)
    raise InputError(f"--check: none of the first {len(found)} images can be read, e.g. {found[0].path}")


def main(arguments: argparse.Namespace) -> None:
    """Exports both networks, compares them with Keras and describes them."""
    target = export.Target(arguments.format, arguments.precision == "float16", arguments.out)
    target.require()
    found = images.find(arguments.check, [])[:COUNT] if arguments.check else []
    networks = pipeline.load(arguments.data, arguments.views, arguments.backbone)
    trained_on = {} if arguments.data else pretrained.training_data(arguments.backbone)
    export.export(networks, target, images_to_check(found, networks.size), trained_on)
    log.info("%s describes how to use them", arguments.out / export.DESCRIPTION)


if __name__ == "__main__":
    run.run(build_parser(), main, writes=WRITES)
