"The documentation site as it is written: links, order, tables, search index, and what machines read."

import json
import re
import resource
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from conftest import ROOT, copy_env, copy_project

from llmops.tools.pipeline import stage_notebooks

STAGES = [Path(s.path).relative_to("nbs").with_name(f"{s.name}.html").as_posix() for s in stage_notebooks(ROOT)]


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
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = site_command(project, "build")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60, "seconds of one core"
    return project


def page(project: Path, name: str) -> str:
    return (project / "_docs" / name).read_text(encoding="utf-8")


def article(project: Path, name: str) -> str:
    "What a page says, without its navigation."
    text = page(project, name)
    return text[text.index("<article") : text.index("</article>")]


def test_no_broken_link(project: Path) -> None:
    done = site_command(project, "check")
    assert done.returncode == 0, done.stderr


def test_a_broken_link_is_named(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "_docs", tmp_path / "_docs")
    (tmp_path / "settings.ini").touch()
    broken = tmp_path / "_docs/00_foundation/project.html"
    broken.write_text(broken.read_text().replace("</article>", '<a href="nowhere.html#x">x</a></article>', 1))
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


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_answers_first(project: Path, stage: str) -> None:
    text = article(project, stage)
    run, parameters, works = (text.index(f'id="{anchor}"') for anchor in ("run-it", "parameters", "how-it-works"))
    assert run < parameters < works
    if 'id="the-saved-run"' in text:
        assert text.index('id="the-saved-run"') < run
    assert run < len(text) / 3, f"running it begins at {run / len(text):.0%} of the page"
    table = text[parameters : text.index("</table>", parameters)]
    assert all(f"<code>{name}</code>" in table for name in ("seed", "out", "wandb"))
    assert re.sub(r"<[^>]+>", "", table.partition("</thead>")[0]).split()[-5:] == [
        "name",
        "type",
        "default",
        "meaning",
        "profiles",
    ]


def test_profiles_are_in_the_parameter_table(project: Path) -> None:
    row = (
        article(project, "02_adaptation/finetuning.html")
        .partition("<td><code>rank</code></td>")[2]
        .partition("</tr>")[0]
    )
    assert "int, 1 to 1024" in row and "LoRA rank" in row and "params <code>16</code>" in row


def test_a_function_has_tables(project: Path) -> None:
    text = article(project, "00_foundation/artifacts.html")
    section = text[text.index('id="file_digest"') :].partition("<h3")[0]
    assert "hexadecimal sha256 of its bytes" in section and "<table" in section
    assert 'href="#file_digest"' in section, "a heading has no permanent link"
    assert "<summary>Source</summary>" in section
    assert (
        "/blob/main/nbs/00_foundation/04_artifacts.ipynb" in text
        and "/blob/main/llmops/foundation/artifacts.py" in text
    )


def test_errors_are_listed(project: Path) -> None:
    section = article(project, "00_foundation/artifacts.html").partition('id="verify"')[2].partition("<h3")[0]
    assert "ArtifactError" in section and "altered since it was sealed" in section


def test_what_machines_read(project: Path) -> None:
    llms = page(project, "llms.txt")
    assert [f"## {group}" in llms for group in ("Start", "Guides", "Lifecycle", "Reference")] == [True] * 4
    root = ET.fromstring(page(project, "sitemap.xml"))
    addresses = [e.text or "" for e in root.iter() if e.tag.endswith("loc")]
    pages = {p.relative_to(project / "_docs").as_posix() for p in (project / "_docs").rglob("*.html")} - {"404.html"}
    assert len(addresses) == len(pages)


def test_pages_describe_themselves(project: Path) -> None:
    version = re.search(r"^version = (.+)$", (ROOT / "settings.ini").read_text(), re.M)
    for path in (project / "_docs").rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert re.search(r'<meta name="description" content="[^"]+', text), path
        assert 'class="md-skip"' in text, path
        assert version and f"version {version[1]}" in text, path
        for image in re.findall(r"<img [^>]*>", text):
            assert re.search(r'alt="[^"]+"', image), f"{path}: {image}"


def test_no_figure_is_left_unfilled(project: Path) -> None:
    for path in [*(project / "_docs/start").rglob("*.html"), *(project / "_docs/guides").rglob("*.html")]:
        assert "{{" not in path.read_text(), path
    board = json.loads((ROOT / "nbs/results/leaderboard.json").read_text())
    merged = next(row for row in board if row["version"] == "qlora-merged-base")
    assert f"{merged['f1']:.3f}" in article(project, "guides/which_merge.html")


def test_a_figure_that_is_not_there_is_named(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns("_docs", "_proc", ".git"))
    guide = copy / "nbs/guides/which_merge.md"
    guide.write_text(guide.read_text().replace("version=qlora-merged-base]", "version=gone]", 1))
    done = site_command(copy, "build")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "nbs/guides/which_merge.md" in done.stderr and "version=gone" in done.stderr
    assert not (copy / "_docs").exists()


def test_the_map_is_clickable(project: Path) -> None:
    text = article(project, "lifecycle/index.html")
    links = re.findall(r'<a href="([^"]+)" aria-label="([^"]+)"', text)
    assert len(links) >= 12
    for step in json.loads((ROOT / "nbs/results/lifecycle.json").read_text())["steps"]:
        page_name = re.sub(r"\d+_(\w+)\.ipynb", r"\1.html", step["notebook"])
        assert any(href == f"../{page_name}" and step["number"] in label for href, label in links), step["step"]


def test_the_index_knows_other_names_and_korean(project: Path) -> None:
    items = json.loads(page(project, "search.json"))["items"]

    def found(*words: str) -> list[str]:
        texts = [(i["location"].partition("#")[0], f"{i['title']} {i['text']}".lower()) for i in items]
        return list(dict.fromkeys(place for place, text in texts if all(word.lower() in text for word in words)))

    assert found("LoRA", "rank")[0] == "02_adaptation/finetuning.html"
    assert "12_tools/redaction.html" in found("personal", "data")
    assert "start/own_documents.html" in found("한국어") and "12_tools/redaction.html" in found("개인정보는")
    places = [item["location"].partition("#")[0] for item in items]
    assert places.index("06_decision/gate.html") < places.index("06_decision/gate_checks.html")


def test_a_second_build_is_the_same(project: Path) -> None:
    def pages() -> dict[str, str]:
        return {p.relative_to(project).as_posix(): p.read_text() for p in (project / "_docs").rglob("*.html")}

    first = pages()
    assert site_command(project, "build").returncode == 0
    assert pages() == first
