"""The floors of the house: a package imports from its own floor and from those below, never upwards, and no modules import
each other in a circle. Studies and tools stand beside the house: they use it, and nothing in it uses them."""

import ast
from pathlib import Path

from conftest import ROOT

FLOORS = {
    "foundation": 0,
    "evaluation": 1,
    "judging": 1,
    "decision": 2,
    "retrieval": 2,
    "adaptation": 3,
    "selection": 3,
    "compression": 4,
    "deployment": 5,
}
BESIDE = ("studies", "tools")


def imported_modules(module: Path) -> set[str]:
    "The library's modules that one imports, at its top or inside functions; dotted, below `llmops`."
    package = module.relative_to(ROOT).with_suffix("").parts
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            names.add(".".join([*base, *(node.module or "").split(".")]))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("llmops.") for name in names if name.startswith("llmops.")}


def library_imports() -> dict[str, set[str]]:
    "Every module of the library, and the modules that it imports."
    files = [f for f in sorted((ROOT / "llmops").glob("*/*.py")) if f.name != "__init__.py"]
    graph = {".".join(f.relative_to(ROOT / "llmops").with_suffix("").parts): imported_modules(f) for f in files}
    return {name: {target for target in targets if target in graph} for name, targets in graph.items()}


def test_every_package_has_a_floor() -> None:
    packages = {name.partition(".")[0] for name in library_imports()}
    assert packages == {*FLOORS, *BESIDE}


def test_imports_go_down() -> None:
    upwards = []
    for module, targets in library_imports().items():
        package = module.partition(".")[0]
        for target in targets:
            above = target.partition(".")[0]
            if package in BESIDE:
                continue
            if above in BESIDE or FLOORS[above] > FLOORS[package]:
                upwards.append(f"{module} imports {target}")
    assert not upwards, "\n".join(upwards)


def test_no_circle_of_modules() -> None:
    graph = library_imports()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
