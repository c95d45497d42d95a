"""Exit codes, messages and locks of a script that is run as from a shell."""

import argparse
import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from melanoma.cli import flags, locking, run
from melanoma.errors import InputError, StageError
from melanoma.log import log

import pytest

pytestmark = pytest.mark.usefixtures("logging_restored")


def exit_code(monkeypatch: pytest.MonkeyPatch, main: Callable[[argparse.Namespace], None], *words: str) -> object:
    """Exit code of a script with the common flags; 0 if it ends normally."""
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    parser = flags.base_parser("A script.")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--distribute", action="store_true")
    try:
        run.run(parser, main)
    except SystemExit as stop:
        return stop.code
    return 0


def places(folder: Path) -> tuple[str, ...]:
    return "--data", str(folder / "data"), "--graphics", str(folder / "graphics")


def failing(error: BaseException) -> Callable[[argparse.Namespace], None]:
    def main(_: argparse.Namespace) -> None:
        raise error

    return main


def nothing(_: argparse.Namespace) -> None:
    pass


def test_script_that_succeeds_logs_time_and_memory_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, lambda _: log.info("working"), *places(tmp_path)) == 0
    shown = capsys.readouterr()
    assert re.fullmatch(r"working\ndone in \d+ s, peak memory \d+\.\d\d GiB\n", shown.out)
    assert shown.err == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("image.jpg is truncated: replace it"), 2, "image.jpg is truncated: replace it"),
        (StageError("x.npy is missing: run step.py first"), 3, "x.npy is missing: run step.py first"),
        (OSError(errno.ENOSPC, "No space left on device", "x.npy"), 2, "x.npy: No space left on device. Fix this"),
        (PermissionError(errno.EACCES, "Permission denied", "x.npy"), 2, "x.npy: Permission denied. Fix this"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "writing a file: Disk quota exceeded. Fix this"),
        (KeyboardInterrupt(), 130, "interrupted. To continue, run the same command\n"),
        (run.Terminated(), 143, "interrupted. To continue, run the same command\n"),
        (MemoryError(), 2, "not enough memory for these settings\n"),
    ],
)
def test_error_that_the_user_can_fix_is_one_line_with_its_exit_code(
    error: BaseException,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(monkeypatch, failing(error), *places(tmp_path)) == code
    shown = capsys.readouterr().err
    assert shown.startswith(f"script.py: {message}") and len(shown.splitlines()) == 1


def test_interruption_that_a_library_dropped_or_replaced_still_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "received", [])
    with contextlib.suppress(run.Terminated):  # as NumPy does
        run.interrupt(signal.SIGTERM, None)
    with pytest.raises(run.Terminated):
        run.check_interrupted()
    assert run.user_message(TypeError()) == ("interrupted. To continue, run the same command", 143)


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.ECONNRESET, "Connection reset by peer")])
def test_bug_keeps_its_traceback(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)) as caught:
        exit_code(monkeypatch, failing(error), *places(tmp_path))
    assert caught.value is error


def test_hint_for_an_interrupted_run_warns_of_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, failing(KeyboardInterrupt()), *places(tmp_path), "--restart") == 130
    assert capsys.readouterr().err.endswith("run the same command without --restart\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends the process without a signal")
def test_sigterm_ends_the_work_like_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert exit_code(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGTERM), *places(tmp_path)) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- folders


def under_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "in"


def read_only(folder: Path) -> Path:
    disk = folder / "read-only"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(disk)]
    if sys.platform == "win32" or os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    return disk


def forbidden(folder: Path) -> Path:
    if sys.platform == "win32" or not os.geteuid():
        pytest.skip("this user may write anywhere")
    closed = folder / "closed"
    closed.mkdir(mode=0o500)
    return closed / "in"


@pytest.mark.parametrize("place", [under_a_file, read_only, forbidden])
@pytest.mark.parametrize("flag", ["--data", "--graphics"])
def test_folder_that_cannot_be_written_is_reported_before_any_work(
    place: Callable[[Path], Path],
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = place(tmp_path)
    try:
        assert exit_code(monkeypatch, failing(AssertionError("it began")), *places(tmp_path), flag, str(folder)) == 2
    finally:
        if place is read_only:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    error = capsys.readouterr().err
    assert "nothing can be written there" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "data").exists() and not (tmp_path / "graphics").exists()


def test_second_run_in_a_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with locking.exclusive_lock(tmp_path / "data"):
        assert exit_code(monkeypatch, nothing, *places(tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'data'}: another run uses this folder (process {os.getpid()} on " in error
    assert "Wait until it ends" in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert exit_code(monkeypatch, nothing, *places(tmp_path)) == 0


@pytest.mark.parametrize("flag", ["--data", "--graphics"])
def test_every_output_folder_is_locked_and_the_message_names_it(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with locking.exclusive_lock(tmp_path / "shared"):
        assert exit_code(monkeypatch, nothing, *places(tmp_path), flag, str(tmp_path / "shared")) == 2
    assert f"{tmp_path / 'shared'}: another run uses this folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_folder_for_everything_is_locked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    (tmp_path / "out").mkdir()
    words = "--data", str(tmp_path / "out"), "--graphics", str(tmp_path / "link")
    assert exit_code(monkeypatch, nothing, *words) == 0


def test_file_name_that_is_not_text_can_be_printed_and_logged(tmp_path: Path) -> None:
    code = "from melanoma.cli import flags, run\nfrom melanoma.log import log\n"
    code += "run.run(flags.base_parser(''), lambda found: (print(found.data), log.info('%s', found.data)))"
    command = [sys.executable, "-c", code, *places(tmp_path), "--data", os.fsdecode(bytes(tmp_path / "data") + b"\xff")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"data\\udcff") == 2


def test_script_without_output_folders_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    seen: list[list[Path]] = []
    run.run(argparse.ArgumentParser(), lambda _: seen.append(list(tmp_path.iterdir())), writes=())
    assert seen == [[]]


@pytest.mark.parametrize(
    ("process", "words", "works"),
    [("1", ["--distribute"], True), ("0", ["--distribute"], False), ("1", [], False)],
)
def test_only_processes_of_a_distributed_job_that_write_nothing_take_no_lock(
    process: str, words: list[str], works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{locking.PREFIX}PROCESS_ID", process)
    done: list[argparse.Namespace] = []
    with locking.exclusive_lock(tmp_path / "data"):
        exit_code(monkeypatch, done.append, *places(tmp_path), *words)
    assert bool(done) == works
