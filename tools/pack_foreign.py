"""Describes the training images of the packed segmentation network, so that predict.py can flag images unlike them.

    python -m tools.pack_foreign --source isic2017

Run it after `python -m tools.pack_pretrained segnet`. Reads the train and validation images of --source, not their
masks and labels, and writes pretrained/foreign.npz. Other networks are not flagged by it.
"""

import argparse
from pathlib import Path

from melanoma.cli import flags, run
from melanoma.dataset import decode
from melanoma.deployment import foreign
from melanoma.deployment.pipeline import BATCH_SIZE
from melanoma.errors import InputError
from melanoma.inference import pretrained
from melanoma.inference.predict import predict
from melanoma.inference.segment import MaskOptions, Segmenter
from melanoma.log import log
from melanoma.sources import reader
from melanoma.sources.records import Record

import numpy as np

SIZE = 256  # pixels; side of the images that predict.py reads


def read(records: list[Record]) -> np.ndarray:
    """Images as the networks see them, uint8 (N, SIZE, SIZE, 3)."""
    return np.stack([decode.read_pair(record.image, None, SIZE).image for record in records])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--source", type=Path, required=True, help="data set with the splits train and validation")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Fits on train, chooses the threshold on validation, and writes both.

    Raises:
        InputError: the source or the packed network is faulty.
    """
    splits = reader.read(arguments.source).splits
    if not (splits.get("train") and splits.get("val")):
        raise InputError(f"{arguments.source}: images of train and validation are needed")
    networks, settings = pretrained.load_segnet(SIZE)
    if settings["design"]["network"] != "unet":
        raise InputError("images are compared by a U-Net only, not by the packed network")
    features = foreign.feature_model(networks[0], settings["design"])
    segmenter = Segmenter(networks, settings["threshold"], MaskOptions(settings["views"], True, BATCH_SIZE))
    train, validation = read(splits["train"]), read(splits["val"])
    lesion = np.concatenate(list(segmenter.probabilities(validation, "masks of validation")))
    reference = foreign.fit(
        np.concatenate(list(predict([features], train, BATCH_SIZE, "features of train"))),
        np.concatenate(list(predict([features], validation, BATCH_SIZE, "features of validation"))),
        foreign.probability_inside(lesion, segmenter.segment(lesion)),
    )
    foreign.save(reference, settings)
    path = pretrained.FOLDER / foreign.FILE
    log.info("%s, %.0f kB, threshold %.3f", path, path.stat().st_size / 1e3, reference.threshold)


if __name__ == "__main__":
    run.run(build_parser(), main, writes=())
