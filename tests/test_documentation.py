"""Docstrings and README against the contract, the parsers and what a run leaves."""

import ast
import importlib
import itertools
import re
import shlex
from pathlib import Path

from melanoma import isic, stages

import pipeline
import pytest

README = pipeline.ROOT / "README.md"
FILE_NAME = re.compile(r"[\w/{},]+\.(?:weights\.h5|npy|json|png|csv|html|md)")
COMMAND = re.compile(r"python (\w+\.py)([^`\n#|;&]*)")
ON_DEMAND = ("graphics/probe", "graphics/gradcam", "graphics/comparison")  # written with flags alone
EXAMPLE = {"split": isic.SPLITS, "backbone": (pipeline.BACKBONE,), "member": ("",)}


def docstring(script: str) -> str:
    text = ast.get_docstring(ast.parse((pipeline.ROOT / script).read_text(encoding="utf-8")))
    assert text
    return text


def expand(path: str) -> list[str]:
    """a_{b,c} becomes a_b, a_c; {split} and {backbone} stay."""
    choices = [part[1:-1].split(",") if "," in part else [part] for part in re.split(r"(\{[\w,]+\})", path)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def named_files(script: str) -> dict[str, list[str]]:
    """What stands under Reads and under Writes, braces expanded; a bare name lies in the folder named before it."""
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
    for name, file in stages.FILES.items():
        for split in (*isic.SPLITS, "{split}"):
            known["data/" + file.path.replace("{split}", split)] = name
    unknown = [path for path in paths if path not in known]
    assert not unknown, f"not in the contract: {unknown}"
    return {known[path] for path in paths}


def in_data(paths: list[str]) -> list[str]:
    return [path for path in paths if path.startswith("data/")]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Script and flags of every `python script.py ...` in a text."""
    found = COMMAND.findall(text.replace("\\\n", " "))
    return [(script, shlex.split(flags)) for script, flags in found]


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_docstring_names_the_files_that_the_contract_gives_the_script(script: str) -> None:
    named = named_files(script)
    written = {name for name, file in stages.FILES.items() if file.writer == script}
    read = {name for name, file in stages.FILES.items() if script in file.readers} - written
    assert contract_names(in_data(named["Writes"])) == written
    assert contract_names(in_data(named["Reads"])) == read


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_files_of_the_docstring_lie_where_such_files_belong(script: str) -> None:
    for path in itertools.chain(*named_files(script).values()):
        assert path.split("/")[0] in {"data", "graphics", "pretrained"}, path


def test_graphics_folder_holds_what_the_docstrings_announce(finished: Path) -> None:
    announced = {
        path.replace("{backbone}", pipeline.BACKBONE).replace("{member}", "")
        for script in pipeline.SCRIPTS
        for path in named_files(script)["Writes"]
        if path.startswith("graphics/")
    }
    announced.remove("graphics/duplicates.png")  # there are none in the sample
    announced = {path for path in announced if not path.startswith(ON_DEMAND)}
    assert announced == {f"graphics/{path.name}" for path in (finished / "graphics").iterdir()}


def test_data_folder_holds_what_the_contract_announces(finished: Path) -> None:
    data = finished / "data"
    announced = {
        file.path.format(split=split, backbone=backbone, member=member)
        for file in stages.FILES.values()
        for split, backbone, member in itertools.product(*EXAMPLE.values())
    }
    announced.remove(f"arrays/test_{pipeline.BACKBONE}_features.npy")  # no one needs them
    announced.remove("arrays/train_probabilities.npy")  # of a cross-validation
    there = {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}
    assert there == announced | {"manifest.json"}


@pytest.mark.parametrize("name", stages.FILES)
def test_writers_and_readers_are_scripts_that_exist(name: str) -> None:
    file = stages.FILES[name]
    for script in (file.writer, *file.readers):
        assert script in pipeline.SCRIPTS
        assert (pipeline.ROOT / script).is_file()
    assert all(pipeline.SCRIPTS.index(script) >= pipeline.SCRIPTS.index(file.writer) for script in file.readers)


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_docstring_has_its_sections_and_its_place_in_the_chain(script: str) -> None:
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


def test_readme_has_the_whole_chain_in_order() -> None:
    named = [script for script, _ in commands(README.read_text(encoding="utf-8"))]
    assert list(dict.fromkeys(script for script in named if script in pipeline.SCRIPTS)) == list(pipeline.SCRIPTS)


def test_commands_of_the_readme_parse() -> None:
    for script, flags in commands(README.read_text(encoding="utf-8")):
        importlib.import_module(script.removesuffix(".py"))
        pipeline.parser(script).parse_args(flags)


def test_make_targets_of_the_readme_exist() -> None:
    rules = (pipeline.ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= set(re.findall(r"^([a-z-]+):", rules, re.MULTILINE))


def test_links_of_the_readme_to_files_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", README.read_text(encoding="utf-8"))
    assert [link for link in links if not (pipeline.ROOT / link).exists()] == []
