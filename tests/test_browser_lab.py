"JupyterLab in a real browser: open a stage's notebook, Run All Cells with its smoke parameters, see it finish."

import json
import sys
import time
from pathlib import Path

from browsing import browser_page, free_port, served
from conftest import ROOT, copy_env, copy_project
from playwright.sync_api import Page

NOTEBOOK = "nbs/02_adaptation/01_finetuning.ipynb"
CELLS = """() => window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code').map(c => ({
    source: c.model.sharedModel.getSource(), count: c.model.executionCount,
    errors: c.model.outputs.toJSON().filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)}))"""


def run_all(page: Page, seconds: float) -> list[dict]:
    "Run > Run All Cells, and wait until every cell has a number or one has failed."
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    end = time.monotonic() + seconds
    while True:
        cells = [c for c in page.evaluate(CELLS) if c["source"].strip()]
        errors = [e for c in cells for e in c["errors"]]
        assert not errors, errors
        if all(c["count"] for c in cells):
            return cells
        assert time.monotonic() < end, (
            f"not finished in {seconds} s: {[c['source'] for c in cells if not c['count']][:1]}"
        )
        page.wait_for_timeout(500)


def test_run_all_cells(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "project")
    before = (project / NOTEBOOK).read_bytes()
    port, token = free_port(), "llmops-test"
    homes = {
        name: str(tmp_path / name)
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={project}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    url = f"http://127.0.0.1:{port}"
    with served(command, f"{url}/api", project, {**copy_env(project), **homes}), browser_page() as (page, _):
        page.goto(f"{url}/lab/tree/{NOTEBOOK}?token={token}&reset")
        page.locator(".jp-Notebook").wait_for(timeout=60_000)
        page.wait_for_function(
            "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'", timeout=60_000
        )
        cells = run_all(page, 420)
        assert cells[-1]["count"] == len(cells)
        page.locator(".jp-Notebook").press("Control+s")
        page.wait_for_function("!window.jupyterapp.shell.currentWidget.context.model.dirty")
        kernel = page.evaluate("""async () => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel; let text = '';
            const future = kernel.requestExecute({code: 'import sys, llmops; print(sys.prefix); print(llmops.__file__)'});
            future.onIOPub = m => { if (m.header.msg_type === 'stream') text += m.content.text; };
            await future.done; await window.jupyterapp.shell.currentWidget.sessionContext.shutdown(); return text; }""")
    prefix, library = kernel.split()
    assert prefix == sys.prefix, "the notebook ran in another environment"
    assert Path(library) == project / "llmops/__init__.py"
    saved = json.loads((project / NOTEBOOK).read_text())
    assert [c["cell_type"] for c in saved["cells"]] == [c["cell_type"] for c in json.loads(before)["cells"]]
    assert not any(o["output_type"] == "error" for c in saved["cells"] for o in c.get("outputs", []))
    assert (ROOT / NOTEBOOK).read_bytes() == before, "the project's own notebook was changed"
    manifests = list((project / "runs/notebook").rglob("manifest.json"))
    assert manifests, "the notebook wrote no artifact"
