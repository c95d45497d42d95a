"""app.py on the networks of a finished chain: the answers, and the page in a browser."""

import gc
import os
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import app
from melanoma.deployment import foreign, pipeline, webpage
from melanoma.deployment.pipeline import Pipeline
from melanoma.errors import InputError

import numpy as np
import pytest
from PIL import Image
from pipeline import BACKBONE, reader

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 120_000  # ms
PHONE = 390  # pixels wide

# Gradio leaves event loops and their sockets open, and uses a deprecated option of pandas.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def leftovers() -> Iterator[None]:
    """Collects what Gradio leaves open, before tests that do not expect it."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def networks(finished: Path) -> Pipeline:
    """The networks of the finished chain, prepared."""
    found = pipeline.load(finished / "data", None, None)
    found.warm_up()
    return found


@pytest.fixture
def image(source: Path, tmp_path: Path) -> Path:
    """The first test image, a copy."""
    return Path(shutil.copy(min((source / "ISIC-2017_Test_v2_Data").glob("*.jpg")), tmp_path))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A file that is no image."""
    path = tmp_path / "notes.txt"
    path.write_text("not an image")
    return path


# -------------------------------------------------------------------------------------------------------------- answers


def test_probabilities_are_those_of_the_scripts(networks: Pipeline, finished: Path, image: Path) -> None:
    (answer,) = webpage.answer(networks, [image])
    store = reader(finished)
    row = store.load("ids", split="test").tolist().index(image.stem)
    for probability in store.load("probabilities", split="test", backbone=BACKBONE)[row]:
        assert f"<td>{probability:.3f}</td>" in answer


def test_file_that_is_no_image_is_named_and_the_others_are_answered(
    networks: Pipeline, image: Path, notes: Path
) -> None:
    broken = notes.with_name("<b>.jpg")
    broken.write_bytes(image.read_bytes()[:500])
    found = [*webpage.answer(networks, [notes, broken, image])]
    assert "<h2>notes.txt</h2>" in found[0] and "not a readable image" in found[0] and str(notes.parent) not in found[0]
    assert "<h2>&lt;b&gt;.jpg</h2>" in found[1] and "<b>" not in found[1]
    assert "data:image/jpeg" in found[2] and "Not predicted" not in found[2]


def test_doubts_are_shown(networks: Pipeline, tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    Image.new("RGB", (100, 80), "grey").save(grey)
    assert "Check: image of one colour" in "".join(webpage.answer(networks, [grey]))


@pytest.mark.slow
def test_image_unlike_those_of_training_is_flagged(tmp_path: Path) -> None:
    noise = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(noise)
    (answer,) = webpage.answer(pipeline.from_pretrained(views=1, backbone="mobilenetv2"), [noise])
    assert f'<p class="alert">Check: {foreign.FLAG}</p>' in answer


def test_files_are_deleted_also_if_nobody_waits_for_the_answer(networks: Pipeline, image: Path, notes: Path) -> None:
    answers = webpage.answer(networks, [image, notes])
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert not image.exists() and not notes.exists()


def test_file_that_another_answer_deleted_is_explained(networks: Pipeline, image: Path) -> None:
    found = [*webpage.answer(networks, [image, image.with_name("gone.jpg")])]
    assert "data:image/jpeg" in found[0] and "dropped twice" in found[1]


@pytest.mark.parametrize("port", ["0", "70000"])
def test_port_out_of_range_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        app.build_parser().parse_args(["--port", port])
    assert "--port" in capsys.readouterr().err


def test_ipv6_address_is_refused(networks: Pipeline, port: int) -> None:
    with pytest.raises(InputError, match="only IPv4"), app.serve(networks, "::1", port, max_megabytes=1):
        pass


def test_too_many_files_are_refused(networks: Pipeline, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webpage, "MAX_IMAGES", 1)
    (answer,) = webpage.answer(networks, [notes, notes])
    assert "drop at most 1 at a time" in answer and not notes.exists()


def test_without_gradio_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install -r requirements/app\.txt"):
        app.main(app.build_parser().parse_args([]))


# --------------------------------------------------------------------------------------------------------------- server


@pytest.fixture
def port() -> int:
    """A free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def address(networks: Pipeline, port: int) -> Iterator[str]:
    """Of the page, which takes files of at most 1 MB."""
    pytest.importorskip("gradio")
    with app.serve(networks, "127.0.0.1", port, max_megabytes=1) as found:
        yield found


def uploads() -> list[Path]:
    """The uploaded files that are there; Gradio also leaves empty ones until the program ends."""
    return [path for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file() and path.stat().st_size]


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_upload_without_answer_is_deleted_after_the_interval(
    networks: Pipeline, port: int, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setattr(app, "CLEAN_EVERY", 1)
    monkeypatch.setattr(app, "CLEAN_AFTER", 1)
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n%s\r\n--x--\r\n'
    with app.serve(networks, "127.0.0.1", port, max_megabytes=1) as address:
        request = urllib.request.Request(
            f"{address}gradio_api/upload",
            part % image.read_bytes(),
            {"Content-Type": "multipart/form-data; boundary=x"},
        )
        urllib.request.urlopen(request).close()
        until(lambda: not uploads())
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert any(folder.iterdir())
    assert not folder.exists()


@pytest.mark.slow
def test_port_in_use_is_reported(networks: Pipeline, address: str) -> None:
    used = int(address.rstrip("/").rpartition(":")[2])
    with (
        pytest.raises(InputError, match=f"port {used}: choose another"),
        app.serve(networks, "127.0.0.1", used, max_megabytes=1),
    ):
        pass


@pytest.mark.slow
def test_functions_of_the_page_are_not_offered_to_programs(address: str) -> None:
    with urllib.request.urlopen(f"{address}gradio_api/info") as answer:
        assert answer.read() == b'{"named_endpoints":{},"unnamed_endpoints":{}}'


# -------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page in a window of a phone's width; in the end it has contacted nothing but its server."""
    found = browser.new_page(viewport={"width": PHONE, "height": 844})
    found.set_default_timeout(PATIENCE)
    requested: list[str] = []
    found.on("request", lambda request: requested.append(request.url))
    found.goto(address)
    found.wait_for_selector("input[type=file]", state="attached")
    yield found
    found.close()
    assert len(requested) > 10
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []


def drop(page: Any, *files: Path) -> None:
    page.set_input_files("input[type=file]", [str(file) for file in files])


@pytest.mark.slow
def test_dropped_files_are_answered_and_deleted(page: Any, image: Path, notes: Path) -> None:
    assert page.inner_text(".gradio-container").startswith("Not a medical device.")
    drop(page, image, notes)
    page.wait_for_function("document.querySelectorAll('.answer').length === 2")
    predicted, failed = page.query_selector_all(".answer")
    assert image.name in predicted.inner_text() and failed.inner_text().startswith("notes.txt\n")
    page.wait_for_function("document.querySelector('.answer img').naturalWidth > 1000")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    until(lambda: not uploads())
    page.wait_for_selector("input[type=file]", state="attached")  # empty again
    drop(page, notes)
    page.wait_for_function("document.querySelectorAll('.answer').length === 1")


@pytest.mark.slow
def test_file_above_the_size_limit_is_named(page: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(2_000_000))
    drop(page, large)
    page.wait_for_function("document.body.innerText.includes('large.jpg')")
    assert "exceed the maximum allowed size" in page.inner_text("body")
    assert uploads() == []
