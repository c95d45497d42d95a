"""The official archives of the challenges: names, contents and number of images.

ISIC 2017: Codella et al. 2018, arXiv 1710.05006. ISIC 2018 task 3, disease classification: Codella et al. 2019, arXiv
1902.03368; its training images are HAM10000, Tschandl et al. 2018, Scientific Data 5:180161, licence CC-BY-NC.
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from melanoma.classes import SPLITS
from melanoma.errors import InputError
from melanoma.sources import csv_table
from melanoma.sources.layouts import challenge_2017, challenge_one_hot

import pandas as pd

KINDS = ("images", "masks", "labels")

# MD5 sums from a third-party download script; the challenges publish none.
MD5 = {
    "ISIC-2017_Training_Data.zip": "a14a7e622c67a358797ae59abb8a0b0c",
    "ISIC-2017_Training_Part1_GroundTruth.zip": "77fdbeb6fbec4139937224416b250f4c",
    "ISIC-2017_Validation_Data.zip": "8d6419d942112f709894c0d82f6c9038",
    "ISIC-2017_Validation_Part1_GroundTruth.zip": "64d3e68fa2deeb8a5e89aa8dec2efd44",
    "ISIC-2017_Test_v2_Data.zip": "5f6a0b5e1f2972bd1f5ea02680489f09",
    "ISIC-2017_Test_v2_Part1_GroundTruth.zip": "b1742de6bd257faca3b2b21a4aa3b781",
}


def read_rows(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of a CSV that must have these columns.

    Raises:
        InputError: the file is missing, is not a CSV or lacks a column.
    """
    table = csv_table.read(path)
    csv_table.require(table, columns)
    return table.columns


@dataclass(frozen=True)
class ArchiveFiles:
    """ArchiveFiles of one kind, one for each split."""

    kind: str  # one of KINDS
    name: str  # on the server; {} stands for the challenge's name of the split
    suffix: str = ".csv"  # of the files to unpack
    read: Callable[[Path], Sized] | None = None  # of labels: reads the CSV, raises InputError if it is invalid
    splits: tuple[str, ...] = SPLITS


@dataclass(frozen=True)
class Challenge:
    """One challenge and its files."""

    title: str
    url: str  # of the folder of the files
    names: Mapping[str, str]  # of the splits
    counts: Mapping[str, int]  # images of each split
    files: tuple[ArchiveFiles, ...]
    next_step: str  # logged when everything is there; {out} stands for the folder
    licence: str = ""  # logged before the download


CHALLENGES = {
    "2017": Challenge(
        title="ISIC 2017",
        url="https://isic-challenge-data.s3.amazonaws.com/2017/",
        names=challenge_2017.NAMES,
        counts=challenge_2017.COUNTS,
        files=(
            ArchiveFiles("images", f"{challenge_2017.IMAGE_FOLDER}.zip", ".jpg"),
            ArchiveFiles("masks", f"{challenge_2017.MASK_FOLDER}.zip", "_segmentation.png"),
            ArchiveFiles("labels", challenge_2017.LABEL_FILE, read=challenge_2017.read_labels),
        ),
        next_step="next: python segmentation_01_preprocessing.py --source {out} --check",
    ),
    "2018": Challenge(
        title="ISIC 2018 task 3",
        url="https://isic-challenge-data.s3.amazonaws.com/2018/",
        names={"train": "Training", "val": "Validation", "test": "Test"},
        counts={"train": 10015, "val": 193, "test": 1512},
        files=(
            ArchiveFiles("images", "ISIC2018_Task3_{}_Input.zip", ".jpg"),
            ArchiveFiles(
                "labels",
                "ISIC2018_Task3_{}_GroundTruth.zip",
                read=partial(read_rows, columns=("image", *challenge_one_hot.CODES["isic2018"])),
            ),
            ArchiveFiles(
                "labels",
                "ISIC2018_Task3_{}_LesionGroupings.csv",
                read=partial(read_rows, columns=("image", "lesion_id", "diagnosis_confirm_type")),
                splits=("train",),
            ),
        ),
        next_step="next, with ISIC 2017 in --source: "
        "python segmentation_01_preprocessing.py --source data --extra {out} --check",
        licence="ISIC 2018 task 3 (HAM10000) has the licence CC-BY-NC: non-commercial use, with attribution to "
        "Tschandl et al. 2018, Scientific Data 5:180161",
    ),
}


@dataclass(frozen=True)
class Part:
    """One archive or CSV of a challenge, and the folder or file that it becomes."""

    files: ArchiveFiles
    file: Path  # the complete download
    count: int  # images, masks or labels that the challenge has

    @property
    def zipped(self) -> bool:
        """Whether it is an archive; otherwise it is a CSV."""
        return self.file.suffix == ".zip"

    @property
    def target(self) -> Path:
        """The unpacked folder of an archive, or the CSV."""
        return self.file.with_suffix("") if self.zipped else self.file

    @property
    def csv(self) -> str:
        """Name of the CSV of labels, in the archive or by itself."""
        return f"{self.file.stem}.csv"

    @property
    def incomplete(self) -> Path:
        """The download while it is incomplete."""
        return self.file.with_name(self.file.name + ".part")

    @property
    def unpacking(self) -> Path:
        """The target folder while it is incomplete."""
        return self.target.with_name(f".{self.target.name}.tmp")

    @property
    def tag(self) -> Path:
        """The server's ETag or modification time of the incomplete download."""
        return self.file.with_name(self.file.name + ".part.tag")


def parts(challenge: Challenge, out: Path, only: Sequence[str]) -> list[Part]:
    """The parts to download.

    Args:
        challenge: one of CHALLENGES.
        out: folder to fill.
        only: some of SPLITS and KINDS; empty for everything.

    Raises:
        InputError: the challenge has no files of a kind in `only`.
    """
    existing = {files.kind for files in challenge.files}
    for kind in KINDS:
        if kind in only and kind not in existing:
            others = ", ".join(other for other in KINDS if other in existing)
            raise InputError(f"--only {kind}: {challenge.title} has no {kind}; it has {others}")
    splits = [split for split in SPLITS if split in only] or SPLITS
    kinds = [kind for kind in KINDS if kind in only] or KINDS
    return [
        Part(files, out / files.name.format(challenge.names[split]), challenge.counts[split])
        for split in splits
        for files in challenge.files
        if files.kind in kinds and split in files.splits
    ]
