"The recipe of CONTRIBUTING.md, followed word for word in a copy of the project."
import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import copy_env


def test_add_a_stage(project: Path) -> None:
    guide = (project / "CONTRIBUTING.md").read_text()
    recipe = guide.partition("## Add a stage")[2]
    python = re.search(r"```python\n(.*?)```", recipe, re.S)
    shell = re.search(r"```sh\n(.*?)```", recipe, re.S)
    assert python and shell
    cells = python[1].partition('"""')[2].partition('"""')[0].splitlines()
    assert len([c for c in cells if c.strip() and c.strip()[0] not in '#>-"']) == 10

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=project, env=copy_env(project), capture_output=True, text=True)

    done = run(sys.executable, "-c", python[1])
    assert done.returncode == 0, done.stderr
    done = run("bash", "-euc", shell[1])
    assert done.returncode == 0, done.stderr
    manifest = json.loads((project / "runs/lengths/manifest.json").read_text())
    assert manifest["kind"] == "lengths" and manifest["params"] == {"data": "tiny:data", "out": "runs/lengths"}
    assert set(manifest["files"]) == {"lengths.json"}
    assert all(n > 0 for n in json.loads((project / "runs/lengths/lengths.json").read_text()))
    assert (project / "llmops/evaluation/lengths.py").is_file()
    assert (project / "runs/lengths/notebook.ipynb").is_file()

    done = run("papermill", "--engine", "llmops", "nbs/04_evaluation/39_lengths.ipynb", "runs/wrong/notebook.ipynb", "-p", "dta", "x")
    assert done.returncode != 0 and "dta" in done.stderr

    done = run(sys.executable, "-m", "llmops.tools.site", "build")
    assert done.returncode == 0, done.stderr
    assert "Answer lengths" in (project / "_docs/index.html").read_text()
