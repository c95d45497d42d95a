"""TensorFlow starts without its notices; warnings and errors still arrive."""

import os
import subprocess
import sys
from pathlib import Path

from melanoma.cli import tensorflow_notices

import pytest

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

FILTERED = """
import os, sys, warnings
from melanoma.cli import tensorflow_notices
with tensorflow_notices.filter_stderr():
    os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n")
    os.write(2, b"I0000 00:00:1795639358.383231 9764 port.cc:153] oneDNN custom operations are on.\\n")
    os.write(2, b"I0000 00:00:1795639358.383598 9764 cpu_feature_guard.cc:227] This TensorFlow binary is optimized\\n")
    os.write(2, b"To enable the following instructions: AVX2 FMA, rebuild TensorFlow.\\n")
    os.write(2, b"E0000 00:00:1795639498.821109 1063 cuda_dnn.cc:8579] Unable to register cuDNN factory\\n")
    os.write(2, b"F0000 00:00:1795639498.821109 1063 cpu_feature_guard.cc:37] no AVX on this machine\\n")
    os.write(2, b"libcuda.so.1: cannot open shared object file\\n")
    warnings.warn("this matters")
    print("printed", file=sys.stderr)
print("after", file=sys.stderr)
"""

BROKEN = """
import melanoma, sys
try:
    import tensorflow
except ImportError as error:
    print("caught", error, file=sys.stderr)
import json
print("and later", file=sys.stderr)
"""


def stderr(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_keras_on_tensorflow_starts_silently_and_warnings_are_shown() -> None:
    code = "import melanoma, keras; assert keras.tree; import warnings; warnings.warn('seen')"
    lines = stderr(code, KERAS_BACKEND="tensorflow").splitlines()
    assert [line.partition(": ")[2] for line in lines] == ["UserWarning: seen"]


def test_only_notices_are_removed() -> None:
    lines = stderr(FILTERED).splitlines()
    assert lines[0].startswith("F0000") and lines[1].startswith("libcuda.so.1")
    assert "UserWarning: this matters" in lines[2]
    assert lines[-2:] == ["printed", "after"]
    assert not any(line.startswith(("WARNING", "I0000", "E0000", "To enable")) for line in lines)


def test_import_that_fails_shows_what_it_wrote(tmp_path: Path) -> None:
    package = tmp_path / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text("import os; os.write(2, b'libfoo is missing\\n'); raise ImportError('libfoo')")
    shown = stderr(BROKEN, PYTHONPATH=os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]]))
    assert shown.splitlines() == ["libfoo is missing", "caught libfoo", "and later"]


def test_import_that_aborts_shows_what_it_wrote(tmp_path: Path) -> None:
    package = tmp_path / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text("import os; os.write(2, b'F0000 this processor has no AVX\\n'); os.abort()")
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    words = [sys.executable, "-c", "import melanoma, tensorflow"]
    done = subprocess.run(words, env=ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "F0000 this processor has no AVX" in done.stderr


def test_process_without_standard_error_works() -> None:
    code = (
        "import os; os.close(2)\n"
        "from melanoma.cli import tensorflow_notices as notices\n"
        "with notices.filter_stderr(): print('inside')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "inside\n")


@pytest.mark.parametrize(("level", "hidden"), [(None, True), ("3", True), ("0", False)])
def test_user_who_sets_the_log_level_decides(level: str | None, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    monkeypatch.delenv(tensorflow_notices.LOG_LEVEL, raising=False)
    if level is not None:
        monkeypatch.setenv(tensorflow_notices.LOG_LEVEL, level)
    before = len(sys.meta_path)
    tensorflow_notices.hide()
    assert len(sys.meta_path) - before == hidden
    assert os.environ[tensorflow_notices.LOG_LEVEL] == (level or "3")
