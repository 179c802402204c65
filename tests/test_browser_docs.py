"""The documentation site, built from the notebooks and read in a real browser.

With TOUR=FOLDER in the environment, pictures of its pages are kept in that folder."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import browser_page, free_port, keep_picture, served
from conftest import copy_env, copy_project
from playwright.sync_api import Page


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = copy_project(tmp_path_factory.mktemp("docs"))
    command = [sys.executable, "-m", "llmops.tools.site", "build"]
    done = subprocess.run(command, cwd=project, env=copy_env(project), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return project


@pytest.fixture(scope="module")
def url(project: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "llmops.tools.site", "serve", "--port", str(port)]
    with served(command, f"http://127.0.0.1:{port}/", project, copy_env(project)) as url:
        yield url


def first_hits(page: Page, query: str) -> list[str]:
    "Where the first results of a search lead."
    page.keyboard.press("/")
    page.get_by_role("combobox", name="Search").fill(query)
    hits = page.get_by_role("listbox", name="Search results").get_by_role("option")
    hits.first.wait_for(timeout=60_000)
    page.wait_for_timeout(500)  # the list is filled word by word
    return [link.get_attribute("href") or "" for link in hits.all()][:10]


def test_a_port_in_use_is_named(project: Path, url: str) -> None:
    port = url.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "llmops.tools.site", "serve", "--port", port]
    done = subprocess.run(command, cwd=project, env=copy_env(project), capture_output=True, text=True)
    assert done.returncode == 1 and f"port {port}" in done.stderr and "Traceback" not in done.stderr


def test_groups_fold(url: str) -> None:
    with browser_page() as (page, problems):
        page.goto(url)
        assert "llmops" in page.title()
        keep_picture(page, "docs-home")
        side = page.locator(".md-sidebar--primary")
        for group in ("Start", "Guides", "Lifecycle", "Reference"):
            assert side.get_by_text(group, exact=True).first.is_visible(), group
        guide = side.get_by_role("link", name="May it ship?", exact=True)
        assert not guide.is_visible(), "a group is open before anybody opened it"
        side.get_by_text("Guides", exact=True).first.click()
        guide.click()
        page.wait_for_url("**/guides/may_it_ship.html")
        keep_picture(page, "docs-guide")
        assert problems == []


def test_search(url: str) -> None:
    wanted = {
        "LoRA rank": "02_adaptation/finetuning.html",
        "personal data": "12_tools/redaction.html",
        "quantize": "07_compression/quantization.html",
        "한국어": "start/own_documents.html",
        "개인정보는": "12_tools/redaction.html",
    }
    with browser_page() as (page, problems):
        for query, target in wanted.items():
            page.goto(url)
            hits = first_hits(page, query)
            if query == "LoRA rank":
                keep_picture(page, "docs-search")
                assert target in hits[0], f"{query}: a stage's page does not come first: {hits}"
            assert any(target in hit for hit in hits), f"{query}: {hits}"
        assert problems == []


def test_a_definition_opens_when_a_link_leads_to_it(url: str) -> None:
    with browser_page() as (page, problems):
        page.goto(f"{url}02_adaptation/finetuning.html")
        keep_picture(page, "docs-stage")
        assert not page.locator("#encode_row").is_visible()
        page.goto(f"{url}02_adaptation/finetuning.html#encode_row")
        page.locator("#encode_row").wait_for(state="visible", timeout=60_000)
        keep_picture(page, "docs-definition")
        assert problems == []


def test_plots_are_visible(url: str) -> None:
    with browser_page() as (page, problems):
        page.goto(f"{url}index.html")
        links = page.locator(".md-sidebar--primary a[href$='.html']").evaluate_all("all => all.map(a => a.href)")
        drawn = 0
        for link in dict.fromkeys(links):
            if '"plot"' not in page.request.get(link).text():
                continue
            page.goto(link)
            for plot in page.locator("article figure.plot img").all():
                plot.evaluate(
                    "e => { for (let d = e.closest('details'); d; d = d.parentElement.closest('details')) d.open = true }"
                )
                plot.scroll_into_view_if_needed()
                page.wait_for_function("e => e.complete && e.naturalWidth > 0", arg=plot.element_handle())
                box = plot.bounding_box()
                assert box and box["width"] > 100 and box["height"] > 50, link
                drawn += 1
        assert drawn > 10, "the saved plots are missing"
        assert problems == []


def test_the_map_leads_to_stages(url: str) -> None:
    with browser_page() as (page, problems):
        page.goto(f"{url}lifecycle/index.html")
        keep_picture(page, "docs-lifecycle")
        page.locator(".map a", has_text="Fine-tuning").click()
        page.wait_for_url("**/02_adaptation/finetuning.html")
        assert problems == []


PAGES = (
    "index.html",
    "guides/which_merge.html",
    "lifecycle/index.html",
    "02_adaptation/finetuning.html",
    "06_decision/gate.html",
)


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_does_not_scroll_sideways(url: str, name: str) -> None:
    with browser_page() as (page, problems):
        page.set_viewport_size({"width": 390, "height": 844})
        page.goto(url + name)
        keep_picture(page, f"docs-phone-{name.removesuffix('.html').replace('/', '-')}")
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{wide} pixels wider than a phone"
        assert problems == []


def test_wide_tables_scroll_in_their_box(url: str) -> None:
    with browser_page() as (page, problems):
        page.set_viewport_size({"width": 390, "height": 844})
        page.goto(f"{url}02_adaptation/finetuning.html")
        box = page.locator("#parameters ~ .md-typeset__scrollwrap").first
        assert box.evaluate("e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX") == "auto"
        assert problems == []


def test_light_and_dark(url: str) -> None:
    with browser_page() as (page, problems):
        rgb = "getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g)"
        background = f"() => {rgb}.slice(0, 3).reduce((a, b) => a + +b, 0)"
        page.emulate_media(color_scheme="dark")
        page.goto(f"{url}02_adaptation/finetuning.html")
        assert page.evaluate(background) < 200, "the system's choice is not followed"
        keep_picture(page, "docs-dark")
        page.emulate_media(color_scheme="light")
        page.goto(url)
        assert page.evaluate(background) > 600
        page.locator("label[for^=__palette]:visible").click()
        page.locator("label[for^=__palette]:visible").click()
        assert page.evaluate(background) < 200, "dark cannot be chosen"
        page.reload()
        assert page.evaluate(background) < 200, "the choice is not kept"
        assert problems == []


def test_the_keyboard_skips_the_navigation(url: str) -> None:
    with browser_page() as (page, problems):
        page.goto(f"{url}02_adaptation/finetuning.html")
        page.keyboard.press("Tab")
        skip = page.locator(".md-skip")
        assert skip.evaluate("e => e === document.activeElement"), "the first Tab does not reach the skip link"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("!!document.activeElement.closest('article')"), "the link does not lead into the page"
        assert problems == []
