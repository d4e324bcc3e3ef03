"""Import direction: geometry <- g2vlm <- {train, eval}; the model knows nothing of data, files or the pipeline."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("geometry", "g2vlm", "train", "eval")
ALLOWED = {
    "geometry": {"geometry"},
    "g2vlm": {"geometry", "g2vlm"},
    "train": {"geometry", "g2vlm", "train"},
    "eval": {"geometry", "g2vlm", "eval"},
}
MODEL_MAY_NOT_IMPORT = ("g2vlm.data", "g2vlm.processing", "g2vlm.images", "g2vlm.pipeline", "g2vlm.scene", "g2vlm.cli",
                        "g2vlm.checkpoint", "g2vlm.convert", "geometry.losses", "geometry.metrics")  # fmt: skip


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the four packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports; relative imports are resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


MODULES = modules()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_import_direction(name: str) -> None:
    package = name.split(".")[0]
    ours = {target.split(".")[0] for target in imports(name, MODULES[name])} & {*PACKAGES, "tests", "benchmarks"}
    assert ours <= ALLOWED[package], f"{name} imports {sorted(ours - ALLOWED[package])}"


@pytest.mark.parametrize("name", [n for n in sorted(MODULES) if n.startswith(("g2vlm.model", "g2vlm.encoders"))])
def test_model_imports_no_application(name: str) -> None:
    targets = imports(name, MODULES[name])
    wrong = sorted(t for t in targets if t.startswith(MODEL_MAY_NOT_IMPORT))
    assert not wrong, f"{name} imports {wrong}"


def test_only_one_module_touches_transformers_internals() -> None:
    users = {n for n, p in MODULES.items() if any(t.startswith("transformers.models") for t in imports(n, p))}
    assert users <= {"g2vlm.compat"}


def test_no_import_cycle() -> None:
    graph = {n: {t for t in imports(n, p, top_level_only=True) if t in MODULES and t != n} for n, p in MODULES.items()}
    done: set[str] = set()

    def visit(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, " -> ".join((*path[path.index(node) :], node))
        if node not in done:
            for target in graph[node]:
                visit(target, (*path, node))
            done.add(node)

    for node in graph:
        visit(node, ())
