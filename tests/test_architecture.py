"""The house's one rule: which room may import which (imports inside functions included)."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "models": {"ray", "orchestrator", "cluster", "jobs", "fsspec", "s3fs", "pyarrow", "mlflow"},
    "orchestrator": {"ray", "jobs"},
    "cluster": {"models", "orchestrator", "jobs", "mlflow"},
    "jobs": {"ray", "torch", "models", "cluster", "mlflow"},
}


def imported_names(source: str) -> Iterator[str]:
    """Top-level names of all imports in a module, wherever they stand."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_only_downwards(room: str) -> None:
    modules = sorted((ROOT / room).rglob("*.py"))
    assert modules, f"{room}/ has no modules"
    for module in modules:
        wrong = FORBIDDEN[room] & set(imported_names(module.read_text()))
        assert not wrong, f"{module.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_models_touch_no_files() -> None:
    for module in sorted((ROOT / "models").rglob("*.py")):
        calls = {node.func.id for node in ast.walk(ast.parse(module.read_text()))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
        assert "open" not in calls, f"{module.relative_to(ROOT)} opens a file"


def test_the_rule_sees_imports_inside_functions() -> None:
    assert set(imported_names("def f():\n    import ray.train\n    from cluster.workers import pool")) == {
        "ray",
        "cluster",
    }


def test_dependencies_are_what_is_imported() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in declared}
    modules = {{"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml"}.get(name, name) for name in names}
    rooms = [module for room in FORBIDDEN for module in (ROOT / room).rglob("*.py")]
    imported = {name for module in rooms for name in imported_names(module.read_text())}
    behind = {"s3fs"}  # fsspec imports it for s3://
    assert modules - behind == imported - set(sys.stdlib_module_names) - set(FORBIDDEN)
