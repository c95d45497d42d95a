"""Step 0: downloads the images, lesion masks and labels of the ISIC 2017 challenge, 12 GB, or ISIC 2018 task 3, 3 GB.

ISIC 2018 task 3 is HAM10000 (10015 images, for training) and 1705 images for validation and test; it has no masks. Its
licence is CC-BY-NC: non-commercial use, with attribution to Tschandl et al. 2018, Scientific Data 5:180161.

Reads   the challenge's official archives, over the network
Writes  --out, the official folders and CSVs (docs/data.md)

Run     python download_data.py
        python download_data.py --challenge 2018 --out data/isic2018
Try     python download_data.py --only val
Expect  the number of images, masks and labels of each split, and their MD5 sums (docs/data.md)
"""

import argparse
from pathlib import Path

from melanoma.classes import SPLITS
from melanoma.cli import flags, run
from melanoma.sources import archives, download


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to fill")
    parser.add_argument(
        "--challenge",
        choices=tuple(archives.CHALLENGES),
        default="2017",
        help="2017: ISIC 2017, 2750 images with masks, 12 GB; 2018: ISIC 2018 task 3 (HAM10000), 11720 images without "
        "masks, about 3 GB, licence CC-BY-NC",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*SPLITS, *archives.KINDS),
        default=[],
        help="splits, kinds of file, or both, such as 'val labels'; default: everything",
    )
    parser.add_argument("--keep-zips", action="store_true", help="keep the archives after unpacking")
    parser.add_argument(
        "--url", help="URL of the folder with the archives, to use a mirror; default: depends on --challenge"
    )
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Downloads and unpacks what is missing."""
    challenge = archives.CHALLENGES[arguments.challenge]
    url = challenge.url if arguments.url is None else arguments.url
    download.fetch(challenge, arguments.out, url, arguments.only, arguments.keep_zips)


if __name__ == "__main__":
    run.run(build_parser(), main, writes=("out",))
