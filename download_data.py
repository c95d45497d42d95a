"""Step 0: downloads the images, lesion masks and labels of the ISIC 2017 challenge, 12 GB.

Reads   the challenge's official archives, over the network
Writes  --out, the official ISIC 2017 folders and CSVs (docs/data.md)

Run     python download_data.py
Try     python download_data.py --only val
Expect  the number of images, masks and labels of each split, and their MD5 sums (docs/data.md)
"""

import argparse
from pathlib import Path

from melanoma.classes import SPLITS
from melanoma.cli import flags, run
from melanoma.sources import download


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to fill")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*SPLITS, *download.KINDS),
        default=[],
        help="splits, kinds of file, or both; 'val labels' is one file; default: everything",
    )
    parser.add_argument("--keep-zips", action="store_true", help="keep the archives after unpacking")
    parser.add_argument("--url", default=download.URL, help="URL of the folder with the archives, to use a mirror")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Downloads and unpacks what is missing."""
    download.fetch(arguments.out, arguments.url, arguments.only, arguments.keep_zips)


if __name__ == "__main__":
    run.run(build_parser(), main, writes=("out",))
