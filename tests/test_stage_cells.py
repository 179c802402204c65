"A batch job runs the cells from the parameters on, with the library's names in place of the cells above."

import ast
import builtins
import importlib
import json
from pathlib import Path

import pytest
from conftest import ROOT

from llmops.tools.pipeline import StageNotebook, stage_notebooks

STAGES = stage_notebooks(ROOT)


def batch_code(notebook: Path) -> ast.Module:
    "The code from the parameters cell on."
    cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    first = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    return ast.parse("\n".join("".join(c["source"]) for c in cells[first:]))


def bound_names(code: ast.Module) -> set[str]:
    "Every name that the code itself gives a value."
    names = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


@pytest.mark.parametrize("stage", STAGES, ids=[s.module for s in STAGES])
def test_the_cells_of_a_batch_job_find_their_names(stage: StageNotebook) -> None:
    code = batch_code(ROOT / stage.path)
    known = {*vars(importlib.import_module(f"llmops.{stage.module}")), *dir(builtins), "get_ipython", "display"}
    used = {n.id for n in ast.walk(code) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    missing = used - known - bound_names(code)
    assert not missing, f"{stage.path}: {sorted(missing)} come from cells that a batch job does not run; import them"
