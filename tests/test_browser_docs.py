"The documentation site, built from the notebooks and read in a real browser."

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import browser_page, free_port, served
from conftest import copy_env, copy_project


def site_command(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmops.tools.site", *words],
        cwd=project,
        env=copy_env(project),
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = copy_project(tmp_path_factory.mktemp("docs"))
    start = time.monotonic()
    done = site_command(project, "build")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    assert time.monotonic() - start < 90
    return project


@pytest.fixture(scope="module")
def url(project: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "llmops.tools.site", "serve", "--port", str(port)]
    with served(command, f"http://127.0.0.1:{port}/", project, copy_env(project)) as url:
        yield url


def test_no_broken_link(project: Path) -> None:
    done = site_command(project, "check")
    assert done.returncode == 0, done.stderr


def test_a_broken_link_is_named(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "_docs", tmp_path / "_docs")
    (tmp_path / "settings.ini").touch()
    page = tmp_path / "_docs/00_foundation/project.html"
    page.write_text(page.read_text().replace("</main>", '<a href="nowhere.html#x">x</a></main>', 1))
    done = subprocess.run(
        [sys.executable, "-m", "llmops.tools.site", "check"],
        cwd=tmp_path,
        env=copy_env(project),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "00_foundation/project.html: nowhere.html#x: no such file" in done.stderr


def test_readme_is_in_step(project: Path) -> None:
    done = site_command(project, "readme", "--check")
    assert done.returncode == 0, done.stderr
    readme = project / "README.md"
    readme.write_text(readme.read_text() + "more\n")
    done = site_command(project, "readme", "--check")
    assert done.returncode == 1 and "README.md" in done.stdout


def test_a_second_build_is_the_same(project: Path) -> None:
    def pages() -> dict[str, str]:
        return {p.relative_to(project).as_posix(): p.read_text() for p in (project / "_docs").rglob("*.html")}

    first = pages()
    assert site_command(project, "build").returncode == 0
    assert pages() == first


def test_a_port_in_use_is_named(project: Path, url: str) -> None:
    port = url.rstrip("/").rpartition(":")[2]
    done = site_command(project, "serve", "--port", port)
    assert done.returncode == 1 and f"port {port}" in done.stderr and "Traceback" not in done.stderr


def test_quarto_is_used_when_it_is_there(project: Path, tmp_path: Path) -> None:
    quarto = tmp_path / "quarto"
    quarto.write_text('#!/bin/sh\ntest -f _quarto.yml -a -f sidebar.yml -a "$1" = render || exit 3\nmkdir -p _docs\n')
    quarto.chmod(0o755)
    shutil.copytree(project / "_proc", tmp_path / "_proc")
    code = "from pathlib import Path; from llmops.tools.site import render_site; print(render_site(Path('_proc').resolve()))"
    env = copy_env(project)
    env["PATH"] = f"{tmp_path}:{env['PATH']}"

    def render() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)

    done = render()
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "_proc/_docs"), done.stderr
    (tmp_path / "_proc/_quarto.yml").unlink()
    assert "quarto ended with code 3" in render().stderr


def test_reading(url: str) -> None:
    with browser_page() as (page, problems):
        page.goto(url)
        assert "llmops" in page.title()
        side = page.locator("#quarto-sidebar")
        for section in ("Foundation", "Adaptation", "Evaluation", "Deployment"):
            assert side.get_by_text(section, exact=True).is_visible(), section
        side.get_by_role("link", name="Artifacts", exact=True).click()
        page.wait_for_url("**/00_foundation/artifacts.html")
        assert page.get_by_role("heading", name="Artifacts", exact=True).is_visible()
        reference = page.locator("pre", has_text="def file_digest(").first
        assert "# hexadecimal sha256 of its bytes" in reference.inner_text()
        assert problems == []


def test_search(url: str) -> None:
    with browser_page() as (page, problems):
        page.goto(url)
        page.get_by_role("searchbox", name="Search").fill("quantization")
        hit = page.locator(".search-result", has_text="uantization").first
        hit.wait_for(timeout=10_000)
        target = hit.get_attribute("href")
        hit.click()
        page.wait_for_load_state()
        assert target and target.partition("#")[0].rpartition("/")[2] in page.url
        assert "quantization" in page.locator("main").inner_text().lower()
        assert problems == []


def test_plots_are_visible(url: str) -> None:
    with browser_page() as (page, problems):
        page.goto(url)
        plot = page.locator('main img[src*="lifecycle"]')
        assert plot.count() == 1, "the home page shows no plot of the life: nbs/results/lifecycle.svg is missing"
        plot.scroll_into_view_if_needed()
        assert plot.evaluate("e => e.complete && e.naturalWidth") > 0
        links = page.locator("#quarto-sidebar a.sidebar-link[href$='.html']").evaluate_all(
            "all => all.map(a => a.href)"
        )
        drawn = 0
        for link in dict.fromkeys(links):
            page.goto(link)
            for plot in page.locator(
                ".cell-output-display > svg, .cell-output-display img, .cell-output-display .figure svg"
            ).all():
                box = plot.bounding_box()
                assert box and box["width"] > 100 and box["height"] > 50, link
                drawn += 1
        assert drawn > 0, "no notebook has a saved plot"
        assert problems == []


def test_light_and_dark(url: str) -> None:
    with browser_page() as (page, problems):
        page.goto(url)
        color = "getComputedStyle(document.body).backgroundColor"
        background = f"() => {color}.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
        assert page.evaluate(background) > 600
        page.locator(".quarto-color-scheme-toggle").click()
        page.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
        assert page.evaluate(background) < 150
        page.reload()
        assert page.evaluate(background) < 150, "the choice is not kept"
        page.locator(".quarto-color-scheme-toggle").click()
        page.wait_for_function("!document.documentElement.classList.contains('quarto-dark')")
        assert page.evaluate(background) > 600
        assert problems == []
