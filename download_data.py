"""Step 0: fetch the photographs, lesion masks and labels of the ISIC 2017 challenge, 12 GB.

Reads   the challenge's official archives, over the network
Writes  --out, the official ISIC 2017 folders and CSVs (README, "Data")

Run     python download_data.py
Try     python download_data.py --only val
Expect  README, "Data"
"""

import argparse
from pathlib import Path

from melanoma import command, download


def parser() -> argparse.ArgumentParser:
    """The script's command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=command.HelpFormatter, allow_abbrev=False)
    flags.add_argument("--out", type=Path, default=Path("data"), help="folder to fill")
    choices = (*download.isic.SPLITS, *download.KINDS)
    flags.add_argument(
        "--only",
        nargs="+",
        choices=choices,
        default=[],
        help="splits, kinds of file, or both: val labels is one file; without it everything",
    )
    flags.add_argument("--keep-zips", action="store_true", help="keep the archives after unpacking")
    flags.add_argument("--url", default=download.URL, help="folder of the archives, where there is a mirror")
    return flags


def main(arguments: argparse.Namespace) -> None:
    """Fetches and unpacks what is not there yet."""
    download.fetch(arguments.out, arguments.url, arguments.only, arguments.keep_zips)


if __name__ == "__main__":
    command.run(parser(), main, writes=("out",))
