from __future__ import annotations

import ast
from pathlib import Path

import pytest

BENCHMARKS = {path.stem: path for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py")}


def defined(tree: ast.Module) -> set[str]:
    """Return the names that a module defines."""
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                name.id
                for target in targets
                for name in ast.walk(target)
                if isinstance(name, ast.Name)
            }
    return names


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_what_benchmarks_take_from_each_other_exists(name: str) -> None:
    tree = ast.parse(BENCHMARKS[name].read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in BENCHMARKS:
            names = {alias.name for alias in node.names}
            there = defined(ast.parse(BENCHMARKS[node.module].read_text(encoding="utf-8")))
            assert names <= there, f"{node.module} lost {names - there}"
