"""The structure of the package: short scripts, small folders, no argparse namespace inside the package."""

import ast
from pathlib import Path

import pipeline
import pytest

FOLDERS = sorted(path for path in (pipeline.ROOT / "melanoma").iterdir() if (path / "__init__.py").is_file())
MODULES = sorted((pipeline.ROOT / "melanoma").rglob("*.py"))
SCRIPT_LINES, FOLDER_MODULES = 200, 10


def relative(path: Path) -> str:
    return path.relative_to(pipeline.ROOT).as_posix()


@pytest.mark.parametrize("path", sorted(pipeline.ROOT.glob("*.py")), ids=relative)
def test_script_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= SCRIPT_LINES


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_folder_is_small_and_says_what_is_inside_and_what_it_may_import(folder: Path) -> None:
    modules = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    assert len(modules) <= FOLDER_MODULES
    described = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
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


def test_tests_mirror_the_folders_of_the_package() -> None:
    folders = {path.name for path in (pipeline.ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert folders >= {folder.name for folder in FOLDERS}
