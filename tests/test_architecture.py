"""The architecture: which package may import which (also inside functions), and the modules of every workflow."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "cluster", "orchestrator", "jobs")
FORBIDDEN = {
    "models": {"ray", "orchestrator", "cluster", "jobs", "fsspec", "s3fs", "pyarrow", "mlflow"},
    "orchestrator": {"ray", "jobs"},
    "cluster": {"models", "orchestrator", "jobs", "mlflow"},
    "jobs": {"ray", "torch", "models", "cluster", "mlflow"},
}
WORKFLOWS = sorted(path.parent.name for path in (ROOT / "orchestrator").glob("*/__init__.py"))


def imported_modules(source: str) -> Iterator[str]:
    """Yield the dotted names that a module imports, also inside functions. `from a import b` yields a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_names(source: str) -> set[str]:
    """Return the top-level names of all imports."""
    return {name.split(".")[0] for name in imported_modules(source)}


def part_of(path: Path) -> str:
    """Return the part of the architecture that a file belongs to: a package, or a module of orchestrator/ itself."""
    names = path.relative_to(ROOT).with_suffix("").parts
    return names[0] if names[0] != "orchestrator" else "/".join(names[:2])


def imports_by_part() -> dict[str, set[str]]:
    """Return for each part of the architecture the parts that it imports."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"]
    part_by_module = {".".join(path.relative_to(ROOT).with_suffix("").parts): part_of(path) for path in files}
    imports: dict[str, set[str]] = {part_of(path): set() for path in files}
    for path in files:
        imports[part_of(path)] |= {
            part_by_module[name] for name in imported_modules(path.read_text()) if name in part_by_module
        }
    return {part: imported - {part} for part, imported in imports.items()}


def levels(imports: dict[str, set[str]]) -> dict[str, int]:
    """Return the level of each part: one more than the highest part that it imports, or 1.

    Raises:
        RecursionError: the imports have a cycle.
    """
    by_part: dict[str, int] = {}

    def level(part: str) -> int:
        if part not in by_part:
            by_part[part] = 1 + max(map(level, imports[part]), default=0)
        return by_part[part]

    return {part: level(part) for part in imports}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_downwards(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules, f"{package}/ has no modules"
    for module in modules:
        wrong = FORBIDDEN[package] & imported_names(module.read_text())
        assert not wrong, f"{module.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_imports_have_no_cycle() -> None:
    level_of = levels(imports_by_part())
    assert level_of["models"] == level_of["cluster"] == 1, "neither imports another part"
    assert max(level_of, key=lambda part: level_of[part]) == "jobs"


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_workflow_has_the_same_modules(workflow: str) -> None:
    for name in ("config.py", "presets.py", "job.py"):
        assert (ROOT / "orchestrator" / workflow / name).exists(), f"orchestrator/{workflow} has no {name}"


def test_models_touch_no_files() -> None:
    for module in sorted((ROOT / "models").rglob("*.py")):
        calls = {node.func.id for node in ast.walk(ast.parse(module.read_text()))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
        assert "open" not in calls, f"{module.relative_to(ROOT)} opens a file"


def test_imports_inside_functions_are_seen() -> None:
    source = "def f():\n    import ray.train\n    from cluster.workers import pool"
    assert imported_names(source) == {"ray", "cluster"}
    assert "cluster.workers" in set(imported_modules(source))


def test_an_import_cycle_is_detected() -> None:
    with pytest.raises(RecursionError):
        levels({"a": {"b"}, "b": {"a"}})


def test_dependencies_are_what_is_imported() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in declared}
    modules = {{"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml"}.get(name, name) for name in names}
    files = [module for package in PACKAGES for module in (ROOT / package).rglob("*.py")]
    imported = set().union(*(imported_names(module.read_text()) for module in files))
    indirect = {"s3fs"}  # fsspec imports it for s3://
    optional = {"lmdb"}  # imported only to read LSUN's layout
    assert modules - indirect | optional == imported - set(sys.stdlib_module_names) - set(FORBIDDEN)


def main() -> None:
    """Print the parts of the architecture, the highest level first, with the parts that each imports."""
    imports = imports_by_part()
    level_of = levels(imports)
    for part in sorted(imports, key=lambda part: (-level_of[part], part)):
        print(f"{level_of[part]:2}  {part:24} -> {', '.join(sorted(imports[part])) or 'nothing'}")
    print(f"{len(imports)} parts, {sum(map(len, imports.values()))} imports, none upwards, no cycle")


if __name__ == "__main__":
    main()
