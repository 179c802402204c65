"What the browser tests share: a server process and a real Chromium."

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import playwright.async_api
from playwright.sync_api import Page, expect, sync_playwright

SLOW = 60_000  # milliseconds; a machine that does other work too gets its time
expect.set_options(timeout=SLOW)
playwright.async_api.expect.set_options(timeout=SLOW)

ARGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def keep_picture(page: Page, name: str, full_page: bool = False) -> None:
    "Keep what the browser shows, when TOUR in the environment names a folder."
    if folder := os.environ.get("TOUR"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=full_page)


def free_port() -> int:
    "A port that nobody listens on."
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


@contextmanager
def served(command: list[str], url: str, cwd: Path, env: dict[str, str], seconds: float = 240) -> Iterator[str]:
    "Run a server until the block is left. Fails with its output when it ends or does not answer in time."
    log = cwd / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(url, timeout=2):
                    break
            except OSError:
                assert server.poll() is None, f"{command} ended:\n{log.read_text()}"
                assert time.monotonic() < end, f"{command} did not answer at {url} in {seconds} s:\n{log.read_text()}"
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        ended(server)


def chromium_path() -> str:
    "The Chromium of this machine."
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "no Chromium on PATH: install it with the system's package manager, e.g. apt-get install chromium"
    return found


def ended(server: subprocess.Popen[str]) -> None:
    "Wait for a server that was told to end, and kill one that does not."
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextmanager
def browser_page() -> Iterator[tuple[Page, list[str]]]:
    "A page of a real Chromium, and the list in which its errors and failed requests gather."
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=ARGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(SLOW)
        page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: problems.append(f"page: {e}"))
        # ERR_ABORTED is the browser's own doing: the test went to the next page before the last icon had come
        page.on(
            "requestfailed",
            lambda r: (
                problems.append(f"request: {r.url} {r.failure}") if "ERR_ABORTED" not in (r.failure or "") else None
            ),
        )
        page.on("response", lambda r: problems.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        yield page, problems
        browser.close()
