"""The package keeps the sizes that a stranger can read."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from statistics import median

import fedlora_flwr

PACKAGE = Path(fedlora_flwr.__file__).parent
LINES = {path: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}


def test_no_file_has_more_than_400_lines_and_half_have_at_most_130() -> None:
    assert len(LINES) > 150
    assert [path.name for path, lines in LINES.items() if lines > 400] == []
    assert median(LINES.values()) <= 130


def test_no_function_has_more_than_50_lines_beside_its_docstring() -> None:
    assert [name for path in LINES for name, lines in functions(path) if lines > 50] == []


def functions(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, lines = node.body[0], (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (first.end_lineno or 0) - first.lineno + 1
            found.append((f"{path.name}:{node.name}", lines))
    return found


def test_no_room_has_more_than_15_percent_of_the_lines() -> None:
    rooms = Counter[str]()
    for path, lines in LINES.items():
        rooms[path.relative_to(PACKAGE).parts[0]] += lines
    assert {room for room, lines in rooms.items() if lines > 0.15 * rooms.total()} == set()


def test_no_function_deletes_an_argument_to_say_that_it_needs_none() -> None:
    assert [f"{path.name}:{line}" for path in LINES for line in deleted_arguments(path)] == []


def deleted_arguments(path: Path) -> list[int]:
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = {one.arg for one in (*node.args.args, *node.args.kwonlyargs)}
            gone = (each for each in ast.walk(node) if isinstance(each, ast.Delete))
            found += [
                each.lineno
                for each in gone
                if any(isinstance(t, ast.Name) and t.id in given for t in each.targets)
            ]
    return found


TESTS = {path: path.read_text("utf-8") for path in Path(__file__).parent.rglob("*.py")}


def test_no_file_of_tests_has_more_than_400_lines() -> None:
    folder = Path(__file__).parent
    long = {str(p.relative_to(folder)) for p, text in TESTS.items() if len(text.splitlines()) > 400}
    assert not long


def test_no_module_imports_from_a_test_module() -> None:
    """What several share is in a support module or a conftest: a test file is run, not read."""
    assert len(TESTS) > 150
    found = {
        f"{path.name} imports {name}"
        for path, text in TESTS.items()
        for node in ast.walk(ast.parse(text))
        for name in imported(node)
        if name.startswith("tests.") and ".test_" in name
    }
    assert found == set()


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{each.name}" for each in node.names]
    return [each.name for each in node.names] if isinstance(node, ast.Import) else []
