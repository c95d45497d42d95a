"""The scripts start and preprocess where Python has no POSIX modules, as on Windows."""

import os
import subprocess
import sys
from pathlib import Path

from melanoma.sources import synthetic

import numpy as np

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
POSIX_ONLY = ("fcntl", "grp", "pwd", "resource", "termios")

WITHOUT_POSIX = """
import importlib, sys
import filelock, psutil  # these have code for each system
sys.modules |= dict.fromkeys({blocked}, None)  # importing them raises ImportError
for name in {scripts}:
    try:
        importlib.import_module(name).build_parser().parse_args(["--help"])
    except SystemExit as stop:
        assert stop.code == 0
from melanoma.cli import run
import segmentation_01_preprocessing as script
sys.argv[0] = "segmentation_01_preprocessing.py"
run.run(script.build_parser(), script.main)
"""


def test_scripts_start_and_preprocess_without_posix_modules(tmp_path: Path) -> None:
    synthetic.write_sample(tmp_path / "source", {"train": 3, "val": 3, "test": 3}, size=(66, 88))
    code = WITHOUT_POSIX.format(blocked=POSIX_ONLY, scripts=SCRIPTS)
    flags = ["--source", "source", "--data", "data", "--graphics", "graphics", "--size", "32", "--jobs", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS) > 6
    assert np.load(tmp_path / "data" / "arrays" / "val_images.npy").shape == (3, 32, 32, 3)
    assert not [path for path in (tmp_path / "data").iterdir() if path.name.startswith(".")]
