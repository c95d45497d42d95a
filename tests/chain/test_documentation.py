"""Docstrings, README and docs against the contract, the command lines and what a run writes."""

import ast
import importlib.util
import itertools
import re
import shlex
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.classes import SPLITS

import pipeline
import pytest

PAGES = [pipeline.ROOT / "README.md", *sorted((pipeline.ROOT / "docs").glob("*.md"))]
PROSE = [*PAGES, *(pipeline.ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"))]
OTHER_SCRIPTS = ("download_data.py", "predict.py", "app.py", "export.py")
README_BYTES = 10_240
FILE_NAME = re.compile(r"[\w/{},]+\.(?:weights\.h5|npy|json|png|csv|html|md)")
COMMAND = re.compile(r"python (\w+\.py)([^`\n#|;&]*)")
MODULE_COMMAND = re.compile(r"python -m ((?:melanoma|tools|benchmarks)[\w.]*)")
CODE_PATH = re.compile(r"`((?:melanoma|tools|tests|benchmarks|requirements|pretrained|docs)/[\w/.-]*)`")
OTHERS = tuple(f"graphics/predictions_{split}_" for split in SPLITS)  # of classifiers beside the main one
PRETRAINING = f"graphics/{pipeline.BACKBONE}_pretrain"
# Written in certain cases only.
OPTIONAL = ("graphics/occlusion", "graphics/gradcam", "graphics/comparison", PRETRAINING, *OTHERS)
FOREIGN_FLAGS = {"--images", "--kills", "--networks"}  # of the benchmarks and tools
EXAMPLE = {"split": SPLITS, "backbone": (pipeline.BACKBONE,), "member": ("",)}


def page_id(path: Path) -> str:
    return path.relative_to(pipeline.ROOT).as_posix()


def docstring(script: str) -> str:
    text = ast.get_docstring(ast.parse((pipeline.ROOT / script).read_text(encoding="utf-8")))
    assert text
    return text


def expand(path: str) -> list[str]:
    """a_{b,c} becomes a_b, a_c; {split} and {backbone} stay."""
    choices = [part[1:-1].split(",") if "," in part else [part] for part in re.split(r"(\{[\w,]+\})", path)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def named_files(script: str) -> dict[str, list[str]]:
    """The files under Reads and Writes, braces expanded; a bare name is in the folder named before it."""
    found: dict[str, list[str]] = {"Reads": [], "Writes": []}
    section = ""
    for line in docstring(script).splitlines():
        if (word := line.split(" ")[0]) and line.strip():
            section = word
        folder = ""
        for path in FILE_NAME.findall(line) if section in found else []:
            folder = path.rpartition("/")[0] or folder
            found[section] += expand(path if "/" in path else f"{folder}/{path}")
    return found


def contract_names(paths: list[str]) -> set[str]:
    """Keys of FILES that the paths stand for."""
    known = {}
    for name, file in contract.FILES.items():
        for split in (*SPLITS, "{split}"):
            known["data/" + file.path.replace("{split}", split)] = name
    unknown = [path for path in paths if path not in known]
    assert not unknown, f"not in the contract: {unknown}"
    return {known[path] for path in paths}


def flags_of(script: str) -> set[str]:
    return {flag for action in pipeline.parser(script)._actions for flag in action.option_strings}


def in_data(paths: list[str]) -> list[str]:
    return [path for path in paths if path.startswith("data/")]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Script and flags of every `python script.py ...` in a text."""
    found = COMMAND.findall(text.replace("\\\n", " "))
    return [(script, shlex.split(flags)) for script, flags in found]


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_docstring_names_the_files_that_the_contract_gives_the_script(script: str) -> None:
    named = named_files(script)
    written = {name for name, file in contract.FILES.items() if file.writer == script}
    read = {name for name, file in contract.FILES.items() if script in file.readers} - written
    assert contract_names(in_data(named["Writes"])) == written
    assert contract_names(in_data(named["Reads"])) == read


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_files_of_the_docstring_are_in_known_folders(script: str) -> None:
    for path in itertools.chain(*named_files(script).values()):
        assert path.split("/")[0] in {"data", "graphics", "pretrained"}, path


def test_graphics_folder_holds_the_files_that_docstrings_name(finished: Path) -> None:
    expected = {
        path.replace("{backbone}", pipeline.BACKBONE).replace("{member}", "")
        for script in pipeline.SCRIPTS
        for path in named_files(script)["Writes"]
        if path.startswith("graphics/")
    }
    expected -= {"graphics/duplicates.png", "graphics/doubtful_masks.png"}  # there are none in the sample
    expected = {path for path in expected if not path.startswith(OPTIONAL)}
    assert expected == {f"graphics/{path.name}" for path in (finished / "graphics").iterdir()}


def test_data_folder_holds_the_files_of_the_contract(finished: Path) -> None:
    data = finished / "data"
    expected = {
        file.path.format(split=split, backbone=backbone, member=member)
        for file in contract.FILES.values()
        for split, backbone, member in itertools.product(*EXAMPLE.values())
    }
    expected.remove(f"arrays/test_{pipeline.BACKBONE}_features.npy")  # not needed
    expected.remove(f"arrays/train_{pipeline.BACKBONE}_probabilities.npy")  # of a cross-validation
    there = {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}
    assert there == expected | {"manifest.json"}


@pytest.mark.parametrize("name", contract.FILES)
def test_writers_and_readers_are_scripts_that_exist(name: str) -> None:
    file = contract.FILES[name]
    for script in (file.writer, *file.readers):
        assert script in pipeline.SCRIPTS
        assert (pipeline.ROOT / script).is_file()
    assert all(pipeline.SCRIPTS.index(script) >= pipeline.SCRIPTS.index(file.writer) for script in file.readers)


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_docstring_has_its_sections_and_its_step_number(script: str) -> None:
    text = docstring(script)
    assert text.startswith(f"Step {1 + pipeline.SCRIPTS.index(script)} of {len(pipeline.SCRIPTS)}: ")
    sections = re.findall(r"^(\w+) {2,}", text, re.MULTILINE)
    assert sections == ["Reads", "Writes", "Run", "Try", "Expect"]


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_commands_of_the_docstring_parse(script: str) -> None:
    found = commands(docstring(script))
    assert len(found) == 2
    for named, flags in found:
        assert named == script
        pipeline.parser(script).parse_args(flags)


def test_readme_is_short() -> None:
    assert PAGES[0].stat().st_size <= README_BYTES


def test_readme_has_the_whole_chain_in_order() -> None:
    named = [script for script, _ in commands(PAGES[0].read_text(encoding="utf-8"))]
    assert list(dict.fromkeys(script for script in named if script in pipeline.SCRIPTS)) == list(pipeline.SCRIPTS)


@pytest.mark.parametrize("page", PROSE, ids=page_id)
def test_commands_of_the_page_parse(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for script, flags in commands(text):
        pipeline.parser(script).parse_args(flags)
    for module in MODULE_COMMAND.findall(text):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("page", PROSE, ids=page_id)
def test_make_targets_of_the_page_exist(page: Path) -> None:
    rules = (pipeline.ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= set(re.findall(r"^([a-z-]+):", rules, re.MULTILINE))


@pytest.mark.parametrize("page", PROSE, ids=page_id)
def test_relative_links_and_code_paths_of_the_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text) if not (page.parent / link).exists()]
    paths = [path for path in CODE_PATH.findall(text) if not (pipeline.ROOT / path).exists()]
    assert links == [] and paths == []


@pytest.mark.parametrize("page", PROSE, ids=page_id)
def test_flags_of_the_page_exist(page: Path) -> None:
    known = {flag for script in (*pipeline.SCRIPTS, *OTHER_SCRIPTS) for flag in flags_of(script)}
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", text)) - FOREIGN_FLAGS
    assert named <= known


def test_readme_names_every_page_of_the_docs() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text] == []


@pytest.mark.parametrize("page", PROSE, ids=page_id)
def test_page_has_no_placeholder_left(page: Path) -> None:
    assert re.findall(r"@[A-Z_]+@", page.read_text(encoding="utf-8")) == []
