"""Files as people's tools write them: every row is read or named, every file of a folder is read or named."""

import csv
import gzip
import io
import json
import os
import string
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops.foundation.curation import benchmark_texts
from llmops.foundation.datafiles import list_folder
from llmops.foundation.datasets import DatasetsParams, run_datasets
from llmops.foundation.decoding import DataError, decode_text
from llmops.foundation.reading import check_rows, read_rows
from llmops.foundation.rowfiles import RowError, parse_json_line, read_csv, read_file, read_jsonl

FIELDS = {name: name for name in ("passage", "question", "answer")}
ANN = {"passage": "Ann lives in Oslo.", "question": "Where does Ann live?", "answer": "Oslo"}
TRY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
SENTENCES = {  # in which code page Windows writes a language, and texts of it
    "cp949": [
        "회의는 3월에 서울에서 열립니다, 참석은 자유입니다.",
        "앤은 어디에 사나요?",
        "제3조(목적) 이 약관은 「예금」에 적용한다.",
    ],
    "cp932": ["会議は3月に東京で開かれます。", "アンはどこに住んでいますか？", "オスロです。"],
    "gb18030": ["会议将于三月在北京举行，参加是自由的。", "我们的银行从您加入之日起支付利息。", "安住在哪里？"],
    "cp950": ["會議將於三月在台北舉行，參加是自由的。", "我們的銀行從您加入之日起支付利息。", "安住在哪裡？"],
    "cp1252": [
        "The “café” in Zürich — £5, isn’t it?",
        "Où est né Molière ? À Paris, bien sûr.",
        "Größe und Maß der Straße",
    ],
    "cp1250": ["Kde bydlí Anna? V Praze, u řeky.", "Přijďte v úterý, bude to těžší než včera.", "Žije v Brně."],
    "cp1251": ["Где живёт Анна? В Осло.", "Совещание состоится в марте в Москве.", "«Нет», — сказала она."],
    "cp1253": ["Η συνάντηση θα γίνει τον Μάρτιο στην Αθήνα.", "Πού μένει η Άννα;", "Στο Όσλο."],
    "cp1254": ["Toplantı mart ayında İstanbul'da yapılacak.", "Şişli'de güneş doğdu.", "Ayşe nerede yaşıyor?"],
}


def table(texts: list[str], delimiter: str = ",") -> str:
    "A CSV file as a program writes it."
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows(
        [["passage", "question", "answer"], *([text, f"Question {i}?", text[:8]] for i, text in enumerate(texts))]
    )
    return out.getvalue()


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("code_page", SENTENCES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "the code page"])
def test_every_encoding_of_excel_and_powershell(tmp_path: Path, code_page: str, encoding: str) -> None:
    codec = code_page if encoding == "the code page" else encoding
    rows = [
        {"passage": text, "question": f"Question {i}?", "answer": text[:8]}
        for i, text in enumerate(SENTENCES[code_page])
    ]
    good = [{name: value.strip() for name, value in row.items()} for row in rows]
    for name, text in {
        "r.csv": table(SENTENCES[code_page]),
        "r.jsonl": lines(*rows),
        "r.json": json.dumps({"data": rows}, ensure_ascii=False),
    }.items():
        notes: list[str] = []
        read, _ = check_rows(str(write(tmp_path / name, text.encode(codec))), FIELDS, notes=notes)
        assert [{field: row[field] for field in FIELDS} for row in read] == good
        said = [f"{name}: read as {notes[0].rpartition(' ')[2]}"] if notes else []
        assert notes == said and bool(notes) == (not codec.startswith("utf-8"))


@TRY
@given(st.text(min_size=1), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp949", "cp1252", "cp1251"]))
def test_a_text_is_itself_or_refused(text: str, encoding: str) -> None:
    "What has a mark or is UTF-8 comes back; a code page comes back, is refused, or is one that spells it alike."
    text = text.replace("\0", "")
    data = text.encode(encoding, "ignore")
    try:
        found, name = decode_text(data, "r.txt")
    except DataError as e:
        assert "utf" not in encoding and ("cannot be told" in str(e) or "iconv" in str(e))
    else:
        assert found.encode(name) in (data, data.removeprefix(b"\xef\xbb\xbf")) or encoding in ("utf-16", "utf-32")
        assert "utf" not in encoding or found == text.removeprefix("\ufeff")


def test_what_cannot_be_told_is_refused_with_what_was_tried(tmp_path: Path) -> None:
    noise = bytes(range(0x80, 0x100))
    path = write(
        tmp_path / "r.csv", b"passage,question,answer\r\n" + b"\r\n".join(noise[i : i + 16] for i in range(0, 112, 16))
    )
    with pytest.raises(DataError, match=r"r.csv: its encoding cannot be told \(tried UTF-8, UTF-16, cp949.*iconv") as e:
        check_rows(str(path), FIELDS)
    assert "cp1252" in str(e.value) and "UTF-8" in str(e.value)
    for content in (b"PK\x03\x04\x14\0\0\0\x08\0\xff\xfe" * 20, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff\xd8"):
        with pytest.raises(DataError, match="r.csv: not a text file"):
            check_rows(str(write(tmp_path / "r.csv", content)), FIELDS)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_damaged_line_of_a_utf8_file_is_named_and_set_aside(tmp_path: Path, suffix: str) -> None:
    texts = [f"{i}월 회의는 서울에서 열립니다." for i in range(1, 9)]
    whole = table(texts) if suffix == "csv" else lines(*(ANN | {"passage": text} for text in texts))
    broken = whole.encode().splitlines(keepends=True)
    broken[4] = broken[4].decode().encode("cp949")
    path = write(tmp_path / f"r.{suffix}", b"".join(broken))
    with pytest.raises(DataError, match=f"r.{suffix}, line 5: not UTF-8"):
        check_rows(str(path), FIELDS)
    good, bad = check_rows(str(path), FIELDS, invalid="set_aside")
    assert [e.where for e in bad] == [f"r.{suffix}, line 5"] and len(good) == len(broken) - 1 - (suffix == "csv")


CELL = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from(",;\t|\"'\n= "), max_size=12)


@TRY
@given(
    st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=5),
    st.sampled_from(",;\t|"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.booleans(),
)
def test_any_table_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], delimiter: str, encoding: str, said: bool
) -> None:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([tuple(FIELDS), *rows])
    text = (f"sep={delimiter}\r\n" if said else "") + out.getvalue()
    path = write(tmp_path_factory.getbasetemp() / "any.csv", text.encode(encoding))
    assert [tuple(row.values()) for _, row in read_csv(path)] == rows


def test_separators_are_said(tmp_path: Path) -> None:
    for delimiter, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")):
        notes: list[str] = []
        list(read_csv(write(tmp_path / "r.csv", table(["One, two", "three; four|"], delimiter)), notes=notes))
        assert notes == [f"r.csv: fields separated by {word}"]
    with pytest.raises(DataError, match="r.csv, line 3: expected 3 fields as in the header, got 4"):
        list(read_csv(write(tmp_path / "r.csv", "passage;question;answer\na;b;c\na;b;c;d\n")))


def test_a_long_field_is_read_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path / "r.csv", table(["word " * 60_000] * 3))
    rows = read_csv(path)
    assert len(next(rows)[1]["passage"]) == 300_000 and csv.field_size_limit() == before  # also while it is being read
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(list(read_csv(path))))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3] * 4 and csv.field_size_limit() == before
    assert csv.field_size_limit(before) == before


JSON_TEXT = st.recursive(
    st.sampled_from(
        ["NaN", "-Infinity", "1e999", "7" * 5000, "-" + "7" * 4301, '"\\ud83d"', "null", "tru", '"', "0x1", "1_0"]
    )
    | st.integers().map(str)
    | st.text().map(json.dumps),
    lambda inner: st.lists(inner, max_size=3).map(lambda v: f"[{','.join(v)}]") | inner.map(lambda v: f'{{"a": {v}}}'),
    max_leaves=6,
)


@TRY
@given(JSON_TEXT)
def test_any_line_is_a_row_or_a_named_error(text: str) -> None:
    try:
        assert isinstance(parse_json_line(text, "r.jsonl, line 7"), dict)
    except RowError as e:
        assert e.where.startswith("r.jsonl, line 7") and e.problem


def test_a_line_that_json_cannot_hold_is_set_aside(tmp_path: Path) -> None:
    huge = '{"n": ' + "7" * 5000 + "}\n"
    deep = '{"n": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    path = write(tmp_path / "r.jsonl", lines(ANN) + huge + deep + lines(ANN) + '{"n": NaN}\n')
    good, bad = check_rows(str(path), FIELDS, invalid="set_aside")
    assert [row["where"] for row in good] == ["r.jsonl, line 1", "r.jsonl, line 4"]
    assert {e.where for e in bad} == {f"r.jsonl, line {n}" for n in (2, 3, 5)}
    with pytest.raises(DataError, match="r.json: not JSON that can be read: Exceeds the limit"):
        list(read_file(write(tmp_path / "r.json", f"[{huge}]")))


NAME = st.sampled_from(
    [
        "qa.csv",
        "QA.JSONL",
        "b.Parquet",
        "._qa.csv",
        "~$qa.csv",
        "_SUCCESS",
        "_qa.csv",
        "qa.csv.crc",
        "part-00000",
        "notes.txt",
        "x",
    ]
)
PLACE = st.sampled_from(
    [
        "",
        "sub/",
        ".ipynb_checkpoints/",
        "__MACOSX/",
        "train.parquet/",
        "train.csv/",
        "a/b/",
        ".git/objects/",
        "train.csv/_temporary/0/",
    ]
)


@TRY
@given(st.sets(st.tuples(PLACE, NAME), max_size=12), st.sampled_from(["**/*", "*.csv", "sub/*", "**/*.jsonl"]))
def test_files_seen_are_files_read_and_files_left(
    tmp_path_factory: pytest.TempPathFactory, tree: set[tuple[str, str]], files: str
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    names = sorted(place + name for place, name in tree)
    for name in names:
        write(folder / name, name)
    found = list_folder(folder, files)
    read, left = [file.name for file in found.read], [name for name, _ in found.left]
    assert sorted(read + left) == sorted(names) and all(reason for _, reason in found.left)
    assert read == [str(p) for p in sorted(map(Path, read))]
    assert not [name for name in read if "/." in f"/{name}" or "~$" in name or "_SUCCESS" in name or "__MACOSX" in name]


def test_a_folder_that_people_and_programs_work_in(tmp_path: Path) -> None:
    "Old answers in a checkpoint, a Mac's resource fork, links in a circle: the corrected row is the one that is read."
    folder = tmp_path / "data"
    new, old = lines(ANN), lines(ANN | {"answer": "Bergen"})
    write(folder / "qa.jsonl", new)
    write(folder / ".ipynb_checkpoints/qa-checkpoint.jsonl", old)
    write(folder / "._qa.jsonl", b"\0\5\x16\7")
    write(folder / "more/QA.JSONL", lines(ANN | {"question": "Who lives in Oslo?", "answer": "Ann"}))
    (folder / "again.jsonl").symlink_to(folder / "qa.jsonl")
    os.link(folder / "qa.jsonl", folder / "third.jsonl")
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    (folder / "more/up").symlink_to(folder)
    outside = write(
        tmp_path / "elsewhere/linked.jsonl", lines(ANN | {"question": "Does Ann live in Oslo?", "answer": "yes"})
    )
    (folder / "linked").symlink_to(outside.parent)
    notes: list[str] = []
    good, _ = check_rows(str(folder), FIELDS, notes=notes)
    assert [(row["where"], row["answer"]) for row in good] == [
        ("linked/linked.jsonl, line 1", "yes"),
        ("more/QA.JSONL, line 1", "Ann"),
        ("qa.jsonl, line 1", "Oslo"),
    ]
    for part in (
        "data: 6 of 9 files",
        "hidden: 2 (",
        "the same file as qa.jsonl: 2",
        "a link to nothing: 1",
        "(more/up/)",
    ):
        assert part in notes[0]
    with pytest.warns(UserWarning, match="6 of 9 files are not read"):
        list(read_rows(str(folder)))


def test_folders_that_spark_writes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for n in (0, 1):
        write(tmp_path / f"train.parquet/.part-0000{n}.parquet.crc", b"crc")
        pq.write_table(
            pa.table({k: [f"{v} {n}"] for k, v in ANN.items()}), tmp_path / f"train.parquet/part-0000{n}.parquet"
        )
        write(tmp_path / f"train.csv/part-0000{n}.csv", table([f"Passage {n}"]) if n else "")
        write(tmp_path / f"train.json/part-0000{n}", lines(ANN, ANN))
    write(tmp_path / "train.parquet/_SUCCESS", b"")
    write(tmp_path / "train.csv/_temporary/0/part-00000.csv", table(["half"]))
    for ref, rows in (("train.parquet", 2), ("train.csv", 1), ("train.json", 4), ("", 7)):
        notes: list[str] = []
        assert len(list(read_rows(str(tmp_path / ref), notes=notes))) == rows
        assert "no row in" in " ".join(notes) or ref in ("train.parquet", "train.json")


@pytest.mark.parametrize("name", ["R.CSV", "r.Json", "r.JSONL", "r.TSV", "r.csv.gz", "r.jsonl.GZ", "r.json.gz"])
def test_suffixes_and_compression(tmp_path: Path, name: str) -> None:
    kind = name.lower().removesuffix(".gz").rpartition(".")[2]
    text = {"csv": table(["One"]), "tsv": table(["One"], "\t"), "jsonl": lines(ANN), "json": json.dumps([ANN])}[kind]
    data = gzip.compress(text.encode("utf-16")) if name.lower().endswith(".gz") else text.encode("utf-16")
    assert len(check_rows(str(write(tmp_path / name, data)), FIELDS)[0]) == 1
    with pytest.raises(DataError, match="not a whole gzip file|empty|cannot be read"):
        list(read_rows(str(write(tmp_path / f"cut.{kind}.gz", gzip.compress(os.urandom(999))[:200]))))


ASKED_TWICE = [
    {"id": "1", "question": ANN["question"], "answers": [{"text": t} for t in ("Oslo", "in Oslo", "Oslo")]},
    {"id": "2", "question": "Where does Bo live?", "answers": [], "is_impossible": True},
]
SQUAD = {
    "version": "2.0",
    "data": [{"title": "Ann", "paragraphs": [{"context": ANN["passage"], "qas": ASKED_TWICE}]}],
}


@pytest.mark.parametrize(
    "answers",
    [
        ["Oslo", "in Oslo", "Oslo"],
        {"text": ["Oslo", "in Oslo"], "answer_start": [13, 10]},
        [{"text": "Oslo", "answer_start": 13}, {"text": "in Oslo"}],
        [{"answer": "Oslo"}, {"answer": "in Oslo"}],
    ],
)
def test_all_reference_answers_are_kept(tmp_path: Path, answers: object) -> None:
    path = write(tmp_path / "r.jsonl", lines(ANN | {"answers": answers}, ANN | {"answers": ["Oslo"]}))
    several, one = check_rows(str(path), FIELDS | {"answer": "answers"})[0]
    assert (several["answer"], several["answers"]) == ("Oslo", ["Oslo", "in Oslo"])
    assert one["answer"] == "Oslo" and "answers" not in one


def test_answers_beside_the_answer_are_kept_when_they_hold_it(tmp_path: Path) -> None:
    row = {"passage": "Ann lives in Oslo.", "question": "Where?", "answer": "Oslo"}
    others: list[object] = [
        ["Oslo", "in Oslo"],
        {"text": ["Oslo", "in Oslo"]},
        ["Rome", "Bergen"],
        {"A": "Rome"},
        None,
        [],
    ]
    lines = "".join(json.dumps(row | {"answers": other}) + "\n" for other in others)
    (tmp_path / "a.jsonl").write_text(lines)
    rows, bad = check_rows(str(tmp_path / "a.jsonl"), {name: name for name in row})
    assert not bad and [r.get("answers") for r in rows] == [["Oslo", "in Oslo"]] * 2 + [None] * 4
    assert {r["answer"] for r in rows} == {"Oslo"}


@pytest.mark.parametrize(
    "text, encoding, expected",
    [
        ("The fee is £20 – or 5 €.", "cp1252", "cp1252"),
        ("Café à Genève, l’été dernier", "cp1252", "cp1252"),
        ("환불 규정", "cp949", "cp949"),
        ("a b " * 20_000 + "환불 규정", "cp949", "cp949"),
        ("价格", "gb18030", None),
        ("1,Привет всем", "koi8-r", None),
        ("환불", "cp949", None),
    ],
)
def test_a_few_letters_are_told_or_refused(text: str, encoding: str, expected: str | None) -> None:
    if expected:
        assert decode_text(text.encode(encoding), "a.txt") == (text, expected)
    else:
        with pytest.raises(DataError, match="a.txt: its encoding cannot be told"):
            decode_text(text.encode(encoding), "a.txt")


def test_squads_own_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train-v2.0.json", json.dumps(SQUAD))
    one, two = check_rows(str(path), FIELDS)[0]
    assert (one["answers"], two["answer"], two["passage"]) == (["Oslo", "in Oslo"], "unknown", ANN["passage"])
    named, _ = check_rows(str(path), {"passage": "context", "question": "question", "answer": "answers"})
    assert [row["where"] for row in named] == [f"train-v2.0.json, row 1, question {n}" for n in (1, 2)]
    assert len(list(benchmark_texts(str(path), ["passage", "question"]))) == 4


def chat(*turns: tuple[str, str], names: tuple[str, str, str] = ("messages", "role", "content")) -> dict:
    return {names[0]: [{names[1]: role, names[2]: text} for role, text in turns]}


SHAREGPT = ("conversations", "from", "value")
ASKED = f"{ANN['passage']}\n\nQuestion: {ANN['question']}"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": ANN["question"], "input": ANN["passage"], "output": "Oslo"},
        {"instruction": ANN["question"], "context": ANN["passage"], "response": "Oslo", "category": "closed_qa"},
        chat(("system", "Be short."), ("user", ASKED), ("assistant", "Oslo")),
        chat(("human", ASKED), ("gpt", "Oslo"), names=SHAREGPT),
        {"context": ANN["passage"]} | chat(("user", ANN["question"]), ("assistant", "Oslo")),
        {"prompt": ASKED, "completion": "Oslo"},
        {"prompt": [{"role": "user", "content": ASKED}], "completion": [{"role": "assistant", "content": "Oslo"}]},
    ],
)
def test_layouts_with_one_reading_are_mapped(tmp_path: Path, row: dict) -> None:
    for name, text in (("r.jsonl", lines(row)), ("r.json", json.dumps([row]))):
        (read,) = check_rows(str(write(tmp_path / name, text)), FIELDS)[0]
        assert {field: read[field] for field in FIELDS} == ANN


@pytest.mark.parametrize(
    "row, message",
    [
        (chat(("user", "Who?"), ("assistant", "Ann")), "a chat without a passage.*`question_field: messages.user`"),
        (chat(("human", "Who?"), ("gpt", "Ann"), names=SHAREGPT), "`question_field: conversations.human`"),
        (chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), "expected a chat of one question"),
        ({"prompt": "Who?", "completion": "Ann"}, "a chat without a passage; a prompt and its completion"),
        ({"instruction": "Write a poem.", "input": "", "output": "..."}, "the passage is empty"),
        (
            {"context": "a", "question": "b", "answers": ["c"]},
            "SQuAD's columns: set `passage_field: context` and `answer_field: answers`",
        ),
    ],
)
def test_other_layouts_are_named_with_what_to_set(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_rows(str(write(tmp_path / "r.jsonl", lines(row))), FIELDS)


def test_a_dot_picks_the_turn_of_a_role(tmp_path: Path) -> None:
    row = chat(("system", ANN["passage"]), ("user", ANN["question"]), ("assistant", "Oslo"))
    fields = {"passage": "messages.system", "question": "messages.user", "answer": "messages.assistant"}
    (read,) = check_rows(str(write(tmp_path / "r.jsonl", lines(row))), fields)[0]
    assert {field: read[field] for field in FIELDS} == ANN


def test_answers_and_notes_reach_the_dataset(tmp_path: Path) -> None:
    "From files that Excel and a script wrote to the splits and the card."
    words = string.ascii_lowercase
    rows = []
    for i in range(60):
        passage = f"Person {words[i % 26]}{i} lives in the town {i} by the river {i * 7} near the hill {i * 3}."
        rows.append(
            {"passage": passage, "question": f"Where does person {i} live?", "answer": [f"town {i}", f"the town {i}"]}
        )
    rows.append(rows[0] | {"answer": ["the town 0"]})
    write(tmp_path / "data/rows.jsonl", lines(*rows).encode("utf-16"))
    write(tmp_path / "data/.hidden.jsonl", "{")
    cfg = DatasetsParams(data=str(tmp_path / "data"), out=str(tmp_path / "out"), test=0.25, valid=0.15, near_duplicate=0.99,
                         general_train=24, general_test=8, wandb="disabled")  # fmt: skip
    made = run_datasets(cfg)
    kept = [row for name in ("train", "valid", "test") for row in made.splits[name]]
    assert len(kept) == 60 and all(row["answers"] == [row["answer"], f"the {row['answer']}"] for row in kept)
    assert made.card["removed"]["duplicate"] == 1
    assert made.card["reading"] == [
        "data: 1 of 2 files are not read; hidden: 1 (.hidden.jsonl)",
        "rows.jsonl: read as utf-16",
    ]
    assert "## Reading\n\n- data: 1 of 2 files" in (made.work / "README.md").read_text()
    stored = [row for _, row in read_jsonl(made.work / "train.jsonl")]
    assert stored == made.splits["train"] and list(stored[0])[4:6] == ["answer", "answers"]
