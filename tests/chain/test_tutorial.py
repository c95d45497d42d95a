"""The tutorial notebook: committed without outputs, names what exists, and runs from the first to the last cell."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract

import pipeline
import pytest

NOTEBOOK = pipeline.ROOT / "notebooks" / "tutorial.ipynb"
SHELL = re.compile(r"^( *)!((?:.*\\\n)*.*)", re.MULTILINE)  # with the lines that a backslash continues
PNG = "image/png"
NEEDED = ("melanoma", "pretrained", *(path.name for path in pipeline.ROOT.glob("*.py")))
TIMEOUT = 1200  # seconds a cell may take; on two quiet cores it takes less than one minute


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def commands() -> list[list[str]]:
    """The words of the commands that start with `python`."""
    found = [command for cell in code_cells() for _, command in SHELL.findall("".join(cell["source"]))]
    words = [shlex.split(command.replace("\\\n", " ")) for command in found]
    return [one for one in words if one[0] == "python"]


def test_notebook_has_no_outputs() -> None:
    cells = code_cells()
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_notebook_runs_all_scripts_in_order_with_flags_that_exist() -> None:
    scripts = [words[1:] for words in commands() if words[1].endswith(".py")]
    assert [script for script, *_ in scripts] == [*contract.SCRIPTS, "predict.py"]
    for script, *flags in scripts:
        pipeline.parser(script).parse_args([flag for flag in flags if flag != "{PLACES}"])
    modules = [words[2] for words in commands() if words[1] == "-m"]
    assert modules == ["pip", "melanoma.sources.synthetic"] and all(map(find_spec, modules))


def test_links_of_the_notebook_exist() -> None:
    links = re.findall(r"\]\(([^)#:\s]+)\)", NOTEBOOK.read_text(encoding="utf-8"))
    assert links and [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's packages
def test_every_cell_runs_and_shows_its_images(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in NEEDED:  # results go to the folder with the scripts
        (tmp_path / name).symlink_to(pipeline.ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # a failing command alone does not end a notebook
            cell.source = SHELL.sub(r"\g<0>\n\g<1>assert _exit_code == 0", cell.source)
    resources = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=resources).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [sum(PNG in output.get("data", {}) for output in cell.outputs) for cell in cells]
    assert shown == [0, 1, 1, 2, 1, 1, 2, 3]  # the second shows a JPEG too
    assert (tmp_path / "demo/tutorial/graphics/report.html").is_file()
