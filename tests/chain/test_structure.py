"""The structure of the package: short scripts, small rooms, argparse only where command lines are built."""

import ast
from pathlib import Path

import pipeline
import pytest

ROOMS = sorted(path for path in (pipeline.ROOT / "melanoma").iterdir() if (path / "__init__.py").is_file())
MODULES = sorted((pipeline.ROOT / "melanoma").rglob("*.py"))
SCRIPT_LINES, ROOM_MODULES = 200, 10


def relative(path: Path) -> str:
    return path.relative_to(pipeline.ROOT).as_posix()


@pytest.mark.parametrize("path", sorted(pipeline.ROOT.glob("*.py")), ids=relative)
def test_script_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= SCRIPT_LINES


@pytest.mark.parametrize("room", ROOMS, ids=relative)
def test_room_is_small_and_says_what_is_inside_and_what_it_may_import(room: Path) -> None:
    modules = [path.stem for path in room.glob("*.py") if path.stem != "__init__"]
    assert len(modules) <= ROOM_MODULES
    described = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert [name for name in modules if name not in described] == []
    assert "May import" in described


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_function_of_the_package_takes_an_argparse_namespace(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    taking = [
        one.name
        for one in functions
        for argument in (*one.args.posonlyargs, *one.args.args, *one.args.kwonlyargs)
        if argument.annotation and ast.unparse(argument.annotation).endswith("Namespace")
    ]
    assert taking == []


def test_tests_mirror_the_rooms() -> None:
    folders = {path.name for path in (pipeline.ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert folders >= {room.name for room in ROOMS}
