"""One run per folder: who gets in, who is refused with which message, and what is left behind."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

from melanoma.cli import locking
from melanoma.errors import InputError

import filelock
import pytest

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from melanoma.cli import locking
with locking.exclusive_lock(Path(sys.argv[1])):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    time.sleep(60)
"""

CONTENDER = """
import sys, time
from pathlib import Path
from melanoma import errors
from melanoma.cli import locking
folder, end, entered = Path(sys.argv[1]), time.monotonic() + 2, 0
while time.monotonic() < end:
    try:
        with locking.exclusive_lock(folder):
            (folder / "inside").touch(exist_ok=False)
            (folder / "inside").unlink()
            entered += 1
    except errors.InputError:
        pass
print(entered)
"""


def test_folder_exists_inside_and_is_gone_afterwards_if_it_is_empty(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    with locking.exclusive_lock(folder):
        assert {path.name for path in folder.iterdir()} == {locking.LOCK, locking.HOLDER}
    assert list(tmp_path.iterdir()) == []


def test_folder_with_results_stays_and_holds_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with locking.exclusive_lock(folder):
        (folder / "result.npy").touch()
    assert [path.name for path in folder.iterdir()] == ["result.npy"]


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bug"), locking.exclusive_lock(tmp_path):
        raise ValueError("bug")
    with locking.exclusive_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_refusal_names_folder_process_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", "with space", "\udcff"])
    with locking.exclusive_lock(tmp_path), pytest.raises(InputError) as refused, locking.exclusive_lock(tmp_path):
        pass
    message = str(refused.value)
    assert message.startswith(f"{tmp_path}: another run uses this folder (process {os.getpid()} on ")
    assert "evaluate.py --data 'with space' '?'). Wait until it ends" in message


def test_holder_that_is_not_described_yet_is_another_process(tmp_path: Path) -> None:
    with locking.exclusive_lock(tmp_path):
        (tmp_path / locking.HOLDER).unlink()
        with pytest.raises(InputError, match=r"\(another process\)"), locking.exclusive_lock(tmp_path):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signals")
def test_lock_of_a_killed_run_is_free_although_its_child_lives(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        child = int(first.stdout.readline())
        try:
            with pytest.raises(InputError, match=f"process {first.pid} on "), locking.exclusive_lock(tmp_path):
                pass
            first.kill()
            first.wait()
            os.kill(child, 0)  # it is alive
            with locking.exclusive_lock(tmp_path):
                assert f"process {os.getpid()} " in (tmp_path / locking.HOLDER).read_text()
            assert list(tmp_path.iterdir()) == []
        finally:
            os.kill(child, signal.SIGKILL)


def test_no_two_runs_hold_the_lock_at_the_same_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONTENDER, str(tmp_path)]
    contenders = [
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [contender.communicate() for contender in contenders]
    assert [error for _, error in outputs] == [""] * 4
    assert sum(int(entered) for entered, _ in outputs) > 10


@pytest.mark.parametrize("code", sorted(locking.NO_LOCKS))
def test_run_continues_on_a_file_system_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def acquire(_: filelock.FileLock) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locking.exclusive_lock(tmp_path / "data"):
        (tmp_path / "data" / "result.npy").touch()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["result.npy"]
    assert f"{tmp_path / 'data'}: this drive does not support file locks: do not start two runs" in caplog.text


def test_other_errors_of_the_file_system_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(_: filelock.FileLock) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(PermissionError), locking.exclusive_lock(tmp_path):
        pass


def test_folder_that_does_not_exist_is_checked_and_not_created(tmp_path: Path) -> None:
    locking.check_writable(tmp_path / "new" / "data")
    assert list(tmp_path.iterdir()) == []


def test_folder_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: nothing can be written there \(.+\)\. Use another folder"):
        locking.check_writable(tmp_path / "file" / "data")


@pytest.mark.parametrize(("number", "leads"), [(None, True), ("0", True), ("1", False)])
def test_first_process_of_a_job_leads(number: str | None, leads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(f"{locking.PREFIX}PROCESS_ID", raising=False)
    if number is not None:
        monkeypatch.setenv(f"{locking.PREFIX}PROCESS_ID", number)
    assert locking.is_leader() == leads
