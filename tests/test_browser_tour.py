"""Pictures for the tour: what a new user types first, and what the pages of a whole run show. The first sets the project up from
nothing, the second needs the run; so they are made only where TOUR in the environment names a folder for them."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browsing import browser_page, free_port, keep_picture, served
from conftest import ROOT, copy_env, copy_project

SESSIONS = {  # picture -> what is typed
    "install": ["make setup"],
    "run": [". .venv/bin/activate", "llmops profile smoke", "llmops run", "llmops status"],
}
STYLE = (
    "body{margin:0;background:#16181d;color:#e6e6e6} b{color:#7fd48a}"
    "pre{margin:24px;font:15px/1.45 'DejaVu Sans Mono',monospace;white-space:pre-wrap}"
)
MOST = 44  # lines of a picture


def typed(project: Path, commands: list[str]) -> str:
    "Run commands one after the other in a shell; them and what they print, as HTML."
    script = "\n".join(f"printf '%s\\n' {'$ ' + command!r}\n{command}" for command in commands)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)
    lines = [line.rpartition("\r")[2].rstrip() for line in plain.splitlines()]
    stages = [line for line in lines if re.match(r"\$ |- |  took|stage \d|\S+: [\d.]+ s$", line)]
    shown = lines if len(lines) <= MOST else [*stages[: MOST // 2], "...", *lines[-MOST // 2 :]]
    return "\n".join(f"<b>{html.escape(x)}</b>" if x.startswith("$ ") else html.escape(x) for x in shown)


@pytest.mark.skipif("TOUR" not in os.environ, reason="TOUR names no folder for pictures")
def test_the_first_commands(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "llmops")
    with browser_page() as (page, problems):
        for name, commands in SESSIONS.items():
            said = typed(project, commands)
            assert said and "Traceback" not in said
            page.set_content(f"<style>{STYLE}</style><pre>{said}</pre>")
            height = page.evaluate("document.querySelector('pre').offsetHeight + 48")
            page.set_viewport_size({"width": 1400, "height": min(height, 1050)})
            keep_picture(page, name)
        assert not problems, problems


@pytest.mark.skipif("TOUR" not in os.environ, reason="TOUR names no folder for pictures")
def test_the_pages_of_a_whole_run() -> None:
    run, question = ROOT / "runs", os.environ.get("TOUR_QUESTION", "Where is the Amazon rainforest?")
    if not (run / "serving/manifest.json").is_file() or not (run / "gate/report.html").is_file():
        pytest.skip("no whole run here: llmops run, llmops rag, llmops gate")
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "llmops.tools.cli", "serve", str(run / "serving"), "--port", str(port)]
    with (
        browser_page() as (page, problems),
        served(command, f"{address}/health", run, copy_env(ROOT), 180),
    ):
        page.goto(address)
        page.locator("#question").fill(question)
        page.keyboard.press("Enter")
        turn = page.locator("#talk > li").last
        turn.locator(".answer").wait_for(timeout=120_000)
        page.wait_for_function("document.querySelector('#talk > li:last-child').getAttribute('aria-busy') === 'false'")
        if turn.locator("details summary").count():
            turn.locator("details summary").first.click()
        keep_picture(page, "ask")
        page.goto((run / "gate/report.html").as_uri())
        keep_picture(page, "gate-report")
        assert not problems, problems
