"""Serves a page to drop images into: overlays, calibrated probabilities, and what to check.

Reads   the images that are dropped into the page
        pretrained/, or with --data the networks that the scripts trained
Writes  nothing that stays: an image is deleted when it is answered

Run     python app.py, then open http://127.0.0.1:7860
Expect  docs/prediction.md
"""

import argparse
import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from melanoma.cli import flags, hardware, run
from melanoma.dataset.decode import MAX_PIXELS
from melanoma.deployment import page, pipeline, webpage
from melanoma.deployment.pipeline import Pipeline
from melanoma.errors import InputError
from melanoma.log import log
from melanoma.sources.records import FORMATS

TITLE = "Melanoma in dermoscopic images"
# What Gradio could do beyond serving the page: links from the internet, a history in the browser, a server for agents.
OFF = dict.fromkeys(("share", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server"), False)
CLEAN_EVERY, CLEAN_AFTER = 60, 600  # seconds; of files that were uploaded but whose answer nobody waited for


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--host", default="127.0.0.1", help="IPv4 address to listen on; 0.0.0.0: also for other machines"
    )
    parser.add_argument("--port", type=port, default=7860, help="port to listen on, 1 to 65535")
    parser.add_argument("--max-megabytes", type=flags.positive_int, default=30, help="size limit of an uploaded file")
    pipeline.add_flags(parser)
    return parser


def port(text: str) -> int:
    """A port, for argparse."""
    if (number := flags.positive_int(text)) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: 1 to 65535")
    return number


def without_proxy(host: str) -> None:
    """Makes Gradio, which checks whether its page can be reached, go there directly."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", "127.0.0.1", host]))


def load_gradio() -> ModuleType:
    """Gradio, with what it reports to its makers switched off.

    Raises:
        InputError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise InputError(
            "app.py needs Gradio: pip install -r requirements/app.txt in an environment of its own (docs/prediction.md)"
        ) from None
    return gradio


@contextlib.contextmanager
def serve(networks: Pipeline, host: str, port: int, max_megabytes: int) -> Iterator[str]:
    """Serves the page; yields its address.

    Raises:
        InputError: Gradio is not installed, or the address cannot be listened on.
    """
    if ":" in host:
        raise InputError(f"--host {host}: only IPv4 addresses and names are supported")
    gradio, warning = load_gradio(), page.template(page.SHARED).module.warning()  # type: ignore[attr-defined]

    def answer(paths: list[str]) -> Iterator[tuple[None, str]]:
        shown = ""
        for one in webpage.answer(networks, [Path(path) for path in paths]):
            shown += one
            yield None, shown  # None: empties the drop area, whose files are deleted

    with tempfile.TemporaryDirectory(prefix="melanoma_") as uploads, contextlib.ExitStack() as stack:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(CLEAN_EVERY, CLEAN_AFTER)) as blocks:
            gradio.HTML(f"{warning}<h1>{TITLE}</h1>")
            drop = gradio.File(
                label=f"{', '.join(FORMATS)}; at most {webpage.MAX_IMAGES} images of {max_megabytes} MB and "
                f"{MAX_PIXELS // 10**6} megapixels each",
                file_count="multiple",
            )
            drop.upload(
                answer,
                drop,
                [drop, gradio.HTML()],
                trigger_mode="multiple",  # files dropped during an answer wait for it
                api_visibility="private",
                concurrency_limit=1,
            )
        without_proxy(host)
        stack.callback(blocks.close, verbose=False)
        try:
            blocks.launch(
                server_name=host,
                server_port=port,
                max_file_size=max_megabytes * 2**20,
                theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                css_paths=webpage.STYLE,
                footer_links=[],
                **OFF,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError:
            raise InputError(f"cannot listen on {host}, port {port}: choose another --port or --host") from None
        yield blocks.local_url


def main(arguments: argparse.Namespace) -> None:
    """Loads the networks and serves the page until it is interrupted."""
    load_gradio()  # before the networks, which take seconds
    hardware.check()
    log.info("loading and preparing the networks")
    networks = pipeline.load(arguments.data, arguments.views, arguments.backbone)
    networks.warm_up()
    with serve(networks, arguments.host, arguments.port, arguments.max_megabytes) as address:
        log.info("open %s; Ctrl-C ends the program", address)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    run.run(build_parser(), main, writes=())
