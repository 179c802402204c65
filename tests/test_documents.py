"""Documents as people have them: what is in a folder is read or named, numbers stay, and a citation points at the original."""

import gzip
import io
import json
import os
import re
import tempfile
import time
import unicodedata
from email.message import EmailMessage
from pathlib import Path

import pytest
from conftest import limit
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops.foundation.curation import WORD
from llmops.retrieval.cleaning import clean_for_search
from llmops.retrieval.documents import IngestError
from llmops.retrieval.grounding import Passage, cite_passages, locate_answer
from llmops.retrieval.html import parse_html
from llmops.retrieval.index import analyse_text
from llmops.retrieval.ingestion import read_corpus, read_document
from llmops.retrieval.markdown import parse_markdown

few = settings(max_examples=40, derandomize=True, deadline=None)


# Folders

NAMES = [
    "a.txt",
    "B.TXT",
    "c: d.Md",
    "e.HTML",
    "f.JsonL",
    "g.CSV",
    "h.docx",
    "no suffix",
    "i\x01.txt",
    "i.txt",
    "é.txt",
    "e\u0301.txt",
    os.fsdecode(b"caf\xe9.txt"),
    "two\nlines.txt",
    ".hidden.txt",
    "~$a.docx",
    ".DS_Store",
]
GOOD = {".jsonl": '{"text": "A fee."}\n', ".csv": "text\nA fee.\n", ".html": "<p>A fee."}
FOLDERS = ["", "terms", "Terms: new", ".git", "terms/deep", "이용 약관"]


def write_file(folder, name, good):
    "A file of one document, or of one entry in the report."
    text = GOOD.get(Path(name).suffix.lower(), "A fee.") if good else " "
    (folder / name).write_text(text)


@st.composite
def trees(draw):
    files = draw(st.lists(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.booleans()), max_size=14))
    kinds = st.sampled_from(["inside", "around", "outside", "itself", "nowhere", "file", "pipe"])
    links = draw(st.lists(st.tuples(st.sampled_from(FOLDERS), kinds), max_size=6))
    return {(folder, name): good for folder, name, good in files}, links


@few
@given(trees())
def test_files_seen_are_files_read_and_files_reported(tree):
    files, links = tree
    with tempfile.TemporaryDirectory() as base:
        root, outside = Path(base, "corpus"), Path(base, "outside")
        for folder in (root, root / "terms", outside):
            folder.mkdir()
        (root / "good.txt").write_text("A fee.")
        for n in range(3):
            (outside / f"{n}.txt").write_text("Another fee.")
        for (folder, name), good in files.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            write_file(root / folder, name, good)
        targets = {
            "inside": root / "terms",
            "around": Path(base),
            "outside": outside,
            "nowhere": root / "gone",
            "file": outside / "0.txt",
        }
        for n, (folder, kind) in enumerate(links):
            (root / folder).mkdir(parents=True, exist_ok=True)
            path = root / folder / f"link{n}.txt"
            if kind == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(targets.get(kind, path))
        seen = sum(len(names) for _, _, names in os.walk(root))
        linked = [(f, kind) for f, kind in links if kind in ("inside", "around", "outside")]
        followed = any(kind == "outside" and f != ".git" for f, kind in linked)
        documents, problems = read_corpus(str(root), progress=False)
    # a folder that is followed is not reported itself, but each of its three files is read
    assert len(documents) + len(problems) == seen + len(linked) + (2 if followed else 0)
    assert len({d.id for d in documents}) == len(documents)
    assert all(p["file"] and p["reason"] for p in problems)
    assert sum(d.id.startswith("link") or "/link" in d.id for d in documents) == 3 * followed + sum(
        kind == "file" and f != ".git" for f, kind in links
    )


def test_a_file_is_named_as_it_is_called(tmp_path):
    for name in ("a: b.docx", "c, d: e.csv", "f: g.txt", "h: i.jsonl"):
        (tmp_path / name).write_text('"' if name.endswith("csv") else " " if name.endswith("txt") else "{")
    (tmp_path / "good.txt").write_text("A fee.")
    _, problems = read_corpus(str(tmp_path), progress=False)
    places = ["a: b.docx", "c, d: e.csv, after line 0", "f: g.txt", "h: i.jsonl, line 1, column 2"]
    assert [p["file"] for p in problems] == places
    with pytest.raises(IngestError, match="^f: g.txt: empty"):
        read_document(tmp_path / "f: g.txt")


def test_names_that_look_alike(tmp_path):
    for form in ("NFC", "NFD"):
        (tmp_path / unicodedata.normalize(form, "환불.txt")).write_text(form)
    if len(list(tmp_path.iterdir())) == 2:  # some file systems take the two names for one
        documents, problems = read_corpus(str(tmp_path), progress=False)
        assert not problems and {d.id: d.text for d in documents} == {
            "환불.txt": "NFC",
            ascii(unicodedata.normalize("NFD", "환불.txt"))[1:-1]: "NFD",
        }


@pytest.mark.parametrize(
    "declared, written, text",
    [
        ("iso-8859-1", "utf-8", "Crème brûlée, 12 €"),
        ("utf-8", "cp949", "환불 규정은 14일입니다."),
        ("ks_c_5601-1987", "cp949", "펲시 환불"),
        ("utf-16", "utf-8", "Crème"),
        ("gb2312", "gb18030", "退款政策朎"),
        ("us-ascii", "cp1252", "It’s £20"),
    ],
)
def test_a_page_and_a_message_in_another_encoding_than_they_say(tmp_path, declared, written, text):
    page = f"<html><head><meta charset={declared}></head><body><p>{text}</p></body></html>"
    (tmp_path / "a.html").write_bytes(page.encode(written))
    mail = f"Subject: x\nContent-Type: text/plain; charset={declared}\nContent-Transfer-Encoding: 8bit\n\n{text}\n"
    (tmp_path / "b.eml").write_bytes(mail.encode(written))
    documents, problems = read_corpus(str(tmp_path), progress=False)
    assert [d.text.strip() for d in documents] == [text, text] and not problems


def test_an_error_about_a_text_names_the_file_once(tmp_path):
    (tmp_path / "a: b.txt").write_bytes("good é\n".encode() + b"bad \xff\n")
    (tmp_path / "b.csv").write_bytes("id,text\n1,Привет всем\n2,как дела\n".encode("koi8-r"))
    (tmp_path / "c.txt").write_text("The fee is due.")
    _, problems = read_corpus(str(tmp_path), progress=False)
    assert [p["file"] for p in problems] == ["a: b.txt, line 2", "b.csv"]
    for problem in problems:
        assert problem["reason"].count(problem["file"][:5]) == 0 and "or give `encoding`" in problem["reason"]
    with pytest.raises(IngestError, match="^encoding='koi9': no such encoding"):
        read_corpus(str(tmp_path), encoding="koi9", progress=False)
    (tmp_path / "a: b.txt").unlink()
    documents, problems = read_corpus(str(tmp_path), encoding="koi8-r", progress=False)
    assert [d.text for d in documents] == ["Привет всем", "как дела", "The fee is due."] and not problems


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp949", "euc-kr"])
def test_rows_in_every_encoding_of_excel_and_powershell(tmp_path, encoding):
    text = "환불 규정은 14일입니다."
    mark = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}.get(encoding, "")
    line = json.dumps({"text": text}, ensure_ascii=False)
    files = {"a.jsonl": f"{line}\r\n{line}\r\n", "b.CSV": f"id,text\r\n1,{text}\r\n", "c.json": f"[{line}]"}
    for name, content in files.items():
        (tmp_path / name).write_bytes((mark + content).encode(encoding))
    documents, problems = read_corpus(str(tmp_path), progress=False)
    assert [d.id for d in documents] == ["a.jsonl#1", "a.jsonl#2", "b.CSV#1", "c.json#1"] and not problems
    assert {d.text for d in documents} == {text}


def test_a_broken_line_does_not_change_the_others(tmp_path):
    good = json.dumps({"text": "환불"}, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + b'{"text": "\xff"}\n' + good + b"\n")
    documents, problems = read_corpus(str(tmp_path), progress=False)
    assert [d.text for d in documents] == ["환불", "환불"]
    assert [p["file"] for p in problems] == ["a.jsonl, line 2"] and "not UTF-8" in problems[0]["reason"]


# What no reader sees

PIECES = [
    "fee",
    "환불",
    "travel",
    "10",
    "２",
    " ",
    "\n",
    "-\n",
    "\u00ad",
    "\u00ad\n",
    "\u200b",
    "\u200d",
    "\u202e",
    "ﬁ",
]
PIECES += ["²", "½", "-", ".", "é", "\u2060", "⼈", "ks", "א\u05b0"]
texts = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@few
@given(texts)
def test_a_clean_text_knows_where_each_character_stood(text):
    clean = clean_for_search(text)
    for n in range(len(clean.text)):
        start, end = clean.span(n, n + 1)
        kept = text[start:end] == clean.text[n]
        assert end == start + 1 and (kept or clean.text[n] in unicodedata.normalize("NFKC", text[start:end]) + " ")
    spans = [clean.span(n, n + 1)[0] for n in range(len(clean.text))]
    assert spans == sorted(spans)
    assert clean_for_search(clean.text).text == clean.text


@few
@given(texts, st.data())
def test_any_words_that_a_reader_sees_are_cited(text, data):
    clean = clean_for_search(text).text
    words = list(WORD.finditer(clean))
    if not words:
        return
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    answer = clean[words[first].start() : words[last].end()]
    start, end = locate_answer(answer, text)
    quote = clean_for_search(text[start:end]).text
    assert "".join(re.findall(r"\w+", quote.lower())) == "".join(re.findall(r"\w+", answer.lower()))


@few
@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from(["\u200b", "-\n", "²", "½", " \u202c"]))
def test_two_numbers_never_become_one(a, b, between):
    assert f"{a}{b}" not in re.findall(r"\d+", clean_for_search(f"{a}{between}{b}").text)


def test_a_word_is_found_whatever_hides_in_it():
    for hidden in ("\u00ad", "\u200b", "\u200c", "\u2060", "\u202a", "\ufeff", "\u00ad\n", "-\n", "-\n  ", "\u2010\n"):
        text = f"The reim{hidden}bursement is ﬁnal."
        assert analyse_text(text, "none") == "The reimbursement is final."
        [citation] = cite_passages("Reimbursement is final", [Passage("d", text, 100)])
        assert text[citation.start - 100 : citation.end - 100] == citation.quote == text[4:-1]
    for kept in ("10² and ½", "A – B", "x-ray", "👩\u200d👩", "Dubai\u200e `Mall`"):
        assert clean_for_search(kept).text == kept


# HTML

numbers = st.integers(0, 999).map(str)


@few
@given(
    numbers, numbers, numbers, st.sampled_from(["sup", "sub", "small", "msup", "msub", "mfrac", "del"]), st.booleans()
)
def test_numbers_beside_each_other_stay_apart(a, b, c, kind, followed):
    page = {
        "msup": f"<math><msup><mn>{a}</mn><mn>{b}</mn></msup></math>",
        "msub": f"<math><msub><mn>{a}</mn><mn>{b}</mn></msub></math>",
        "mfrac": f"<math><mfrac><mn>{a}</mn><mn>{b}</mn></mfrac></math>",
        "del": f"<del>{a}</del>{b}",
    }.get(kind, f"{a}<{kind}>{b}</{kind}>")
    behind = c if followed and kind in ("sup", "sub", "small") else ""
    text = parse_html(f"<p>{page}{behind}</p>").text
    assert re.findall(r"\d+", text) == [a, b, behind][: 3 if behind else 2]


@pytest.mark.parametrize(
    "page, text",
    [
        ("10<sup>2</sup> m<sup>2</sup>", "10^2 m^2"),
        ("E = mc<sup>2</sup>", "E = mc^2"),
        ("10<sup>−3</sup> and 2<sup>n+1</sup>", "10^−3 and 2^(n+1)"),
        ("10<span style='font-size:60%; vertical-align: super;'>2</span>", "10^2"),
        (
            "costs 50<sup><a href='#n1'>1</a></sup> a year.<sup>2</sup> Fees<sup>3</sup>",
            "costs 50 [1] a year. [2] Fees [3]",
        ),
        ("<sup>1</sup> In the first year.", "[1] In the first year."),
        ("only $19<sup>99</sup> or 19<sup>99</sup>&nbsp;€", "only $19.99 or 19.99 €"),
        ("1<sup>st</sup> of May, M<sup>me</sup> Curie, 50<sup>*</sup>", "1st of May, Mme Curie, 50*"),
        ("2<sup>1</sup>/<sub>2</sub> cups of H<sub>2</sub>O, CO<sub>2</sub>", "2 1/2 cups of H2O, CO2"),
        ("101<sub>2</sub> is log<sub>2</sub>32", "101_2 is log_2 32"),
        ("<sup>14</sup>C and Ca<sup>2+</sup>", "^14C and Ca^2+"),
        ("<s>$50</s>$40", "~~$50~~$40"),
        ("in 2019.<sup>12</sup> and 50<sup>1)</sup>", "in 2019. [12] and 50 [1]"),
        ("EUR 19,<sup>95</sup> or $19<small>95</small>", "EUR 19,95 or $19.95"),
    ],
)
def test_raised_and_lowered_text(page, text):
    assert parse_html(f"<p>{page}</p>").text == text


@pytest.mark.parametrize(
    "page",
    [
        "<nav><ul><li>Home<li>Help<h1>Refunds</h1><p>Refunds take 14 days.</p>",
        "<div><nav><a>Home</a><p>Refunds take 14 days.</p></div><p>Long footer. " + "More. " * 99,
        "<nav><a>Home</a><main><p>Refunds take 14 days.</main></nav>",
        "<p>x</p><button>Buy <p>Refunds take 14 days.</p>",
        "<svg><circle/><p>Refunds take 14 days.</p>",
        "<nav>Refunds take 14 days.</nav>",
    ],
)
def test_what_is_never_closed_costs_no_text(page):
    assert "Refunds take 14 days." in parse_html(f"<html><body>{page}</body></html>").text


@pytest.mark.parametrize("name", ["sup", "small", "del", "msup", "nav", "b"])
def test_a_page_may_nest_without_end(name):
    start = time.process_time()
    assert "deep" in parse_html(f"<{name}>" * 10_000 + "deep").text
    assert time.process_time() - start < limit(10)


def test_navigation_is_left_out():
    page = "<body><NAV class=x><a>Home</a></NAV><p>Fees.</p><nav>Help</nav><svg/><button>Pay</button></body>"
    assert parse_html(page).text == "Fees."


# Markdown

RULED = "---\n{}\n---\n\n# Fees\n\nNone.\n"


@pytest.mark.parametrize(
    "text",
    [
        RULED.format("Note: the fees change in May."),
        RULED.format("Fees: 5 euros\nLimits: 10 euros"),
        RULED.format("\nnote: new\n"),
        RULED.format("In short: no fees."),
        RULED.format("주의: 수수료가 5월부터 모두 바뀝니다."),
        "+++\nno TOML\n+++\n\nText",
        "+++ a rule of pluses +++\n",
    ],
)
def test_a_text_between_two_rules_is_kept(text):
    parsed = parse_markdown(text)
    assert parsed.text == text and not parsed.metadata


@pytest.mark.parametrize(
    "front, metadata",
    [
        ("---\nteam: cards\n---\n", {"team": "cards"}),
        (
            "---\nTitle: Fees\nNote: the fees change in May.\n---\n",
            {"Title": "Fees", "Note": "the fees change in May."},
        ),
        ("---\n부서: 여신 2팀\n...\n", {"부서": "여신 2팀"}),
        ("+++\nversion = 1.10\ntags = ['a', 'b']\n+++\n", {"version": "1.10", "tags": "a, b"}),
    ],
)
def test_front_matter(front, metadata):
    assert parse_markdown(front + "# Fees\n")[:4] == ("# Fees\n", "Fees", ((0, "Fees"),), metadata)


# PDF and e-mail


def pdf_bytes(content, font="/Encoding /WinAnsiEncoding", page="", more=()):
    "A PDF of one page, written by hand."
    stream = content.encode("latin-1")
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> {page} >>",
        f"<< /Length {len(stream)} >>\nstream\n{content}\nendstream",
        f"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica {font} >>",
        *more,
    ]
    out, starts = io.BytesIO(), []
    out.write(b"%PDF-1.7\n")
    for n, o in enumerate(objects, 1):
        starts.append(out.tell())
        out.write(f"{n} 0 obj\n{o}\nendobj\n".encode("latin-1"))
    table = out.tell()
    rows = "".join(f"{at:010d} 00000 n \n" for at in starts)
    out.write(f"xref\n0 {len(starts) + 1}\n0000000000 65535 f \n{rows}".encode())
    out.write(f"trailer\n<< /Size {len(starts) + 1} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n".encode())
    return out.getvalue()


def lines(*rows, x=72, y=720):
    return "".join(f"BT /F1 11 Tf {x} {y - 14 * n} Td ({row}) Tj ET\n" for n, row in enumerate(rows))


def read_pdf(tmp_path, *args, **more):
    (tmp_path / "a.PDF").write_bytes(pdf_bytes(*args, **more))
    [document] = read_document(tmp_path / "a.PDF")
    return document


def test_forms_and_notes_of_a_pdf_are_read(tmp_path):
    widget = "<< /Type /Annot /Subtype /Widget /Rect [0 0 9 9]"
    more = [
        f"{widget} /FT /Tx /T (name) /TU (Your name) /V (Bo Berg) >>",
        f"{widget} /FT /Btn /T (terms) /V /Yes /AS /Yes >>",
        f"{widget} /FT /Ch /T (plan) /V [(Gold) (Blue)] >>",
        f"{widget} /FT /Tx /T (pin) /Ff 8192 /V (1234) >>",
        f"{widget} /FT /Tx /T (ghost) /F 2 /V (unseen) >>",
        "<< /Type /Annot /Subtype /FreeText /Rect [0 0 9 9] /Contents (Fee waived until May.) >>",
        "<< /Type /Annot /Subtype /Text /Rect [0 0 9 9] /Contents (Ask Kim.) >>",
        "<< /Type /Annot /Subtype /Link /Rect [0 0 9 9] /Contents (a link) >>",
        f"{widget} /Parent 15 0 R >>",
        "<< /FT /Tx /T (city) /V (Oslo) /Kids [14 0 R] >>",
    ]
    annots = f"/Annots [{' '.join(f'{n} 0 R' for n in range(6, 15))}]"
    document = read_pdf(tmp_path, lines("Order form"), page=annots, more=more)
    assert document.text.split("\n") == [
        "Order form",
        "Your name: Bo Berg",
        "terms: Yes",
        "plan: Gold, Blue",
        "Fee waived until May.",
        "Ask Kim.",
        "city: Oslo",
    ]


@pytest.mark.parametrize(
    "rotated",
    [
        "BT /F1 11 Tf 0 1 -1 0 300 400 Tm (A stamp) Tj ET\n",
        "BT /F1 40 Tf 0.7 0.7 -0.7 0.7 200 300 Tm (A stamp) Tj ET\n",
        "q 0 -1 1 0 20 300 cm BT /F1 11 Tf 1 0 0 1 0 0 Tm (A stamp) Tj ET Q\n",
    ],
)
def test_rotated_text_does_not_cross_a_sentence(tmp_path, rotated):
    document = read_pdf(tmp_path, lines("The fee is") + rotated + lines("due on Monday.", y=706))
    assert document.text == "The fee is\ndue on Monday.\nA stamp"
    [citation] = cite_passages("the fee is due on Monday", [Passage("a", document.text, 0)])
    assert citation.quote == "The fee is\ndue on Monday"


def test_ligatures_and_broken_words_of_a_pdf_are_cited(tmp_path):
    font = "/Encoding << /Type /Encoding /BaseEncoding /WinAnsiEncoding /Differences [1 /fi 2 /fl] >>"
    document = read_pdf(tmp_path, lines("The \\001nal reimburse-", "ment of \\002ights."), font=font)
    assert document.text == "The ﬁnal reimburse-\nment of ﬂights."  # as it stands in the file
    [citation] = cite_passages("Final reimbursement of flights", [Passage("a", document.text, 0)])
    assert citation.quote == document.text[4:-1]


def test_a_message_is_read_and_its_attachments_are_named(tmp_path):
    letter = EmailMessage()
    letter["Subject"], letter["From"], letter["Date"] = (
        "환불 문의",
        "Bo <bo@example.org>",
        "Mon, 6 Jan 2025 10:00:00 +0000",
    )
    letter.set_content("Please refund 12 €.")
    letter.add_alternative("<p>Please <b>refund</b> 12 €.", subtype="html")
    letter.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="영수증.pdf")
    (tmp_path / "a.EML").write_bytes(letter.as_bytes())
    (tmp_path / "b.eml").write_bytes(b"\x89PNG nothing")
    page = "Subject: Fees\nContent-Type: text/html; charset=ks_c_5601-1987\n\n<nav>x</nav><p>10<sup>2</sup> 환불"
    (tmp_path / "c.eml").write_bytes(page.encode("cp949"))
    (first, second), problems = read_corpus(str(tmp_path), progress=False)
    assert (first.title, first.text) == ("환불 문의", "Please refund 12 €.\n")
    assert first.metadata["from"] == "Bo <bo@example.org>" and first.metadata["attachments"] == "영수증.pdf"
    assert (second.title, second.text) == ("Fees", "10^2 환불")
    assert [p["file"] for p in problems] == ["a.EML, attachment 영수증.pdf", "b.eml"]


def test_a_message_with_a_mark_and_an_attachment_whose_name_holds_a_comma(tmp_path):
    letter = EmailMessage()
    letter["Subject"] = "Fees"
    letter.set_content("Please see below.")
    letter.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="fees, 2025.pdf")
    (tmp_path / "a.eml").write_bytes(b"\xef\xbb\xbf" + letter.as_bytes())
    [document], problems = read_corpus(str(tmp_path), progress=False)
    assert (document.title, document.text) == ("Fees", "Please see below.\n")
    assert [p["file"] for p in problems] == ["a.eml, attachment fees, 2025.pdf"]


@pytest.mark.parametrize(
    "answer, text, there",
    [
        (unicodedata.normalize("NFD", "환불 규정"), "카드 환불 규정은 14일이다.", "환불 규정"),
        ("환불 규정", unicodedata.normalize("NFD", "카드 환불 규정은"), unicodedata.normalize("NFD", "환불 규정")),
        ("ｶﾞｽ", "東京ガス に", "ガス"),
        ("14", "within １４ days", "１４"),
        ("strasse", "in der Straße 5", "Straße"),
        ("10%", "costs \u206610\u2069 ٪ more", "10"),
        ("दिन", "वह दीन है, आज का दिन अच्छा", "दिन"),
    ],
)
def test_an_answer_is_cited_in_whatever_characters_the_document_has(answer, text, there):
    [citation] = cite_passages(answer, [Passage("a.txt", text, 5)])
    assert citation.quote.strip("\u2066\u2069") == there
    assert text[citation.start - 5 : citation.end - 5] == citation.quote


def test_a_word_with_other_vowels_is_not_cited():
    assert cite_passages("दिन", [Passage("a.txt", "दीन और दान", 0)]) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json", ".tsv", ".ndjson"])
def test_rows_of_every_format_compressed_or_not(tmp_path, suffix):
    rows = {".csv": "text\nThe fee is £5.\n", ".tsv": "id\ttext\n1\tThe fee is £5.\n"}
    data = rows.get(suffix, '{"text": "The fee is £5."}\n').encode("cp1252")
    (tmp_path / f"a{suffix.upper()}").write_bytes(data)
    (tmp_path / f"b{suffix}.gz").write_bytes(gzip.compress(data))
    documents, problems = read_corpus(str(tmp_path), progress=False)
    assert [d.text for d in documents] == ["The fee is £5."] * 2 and not problems


def test_a_small_file_that_unfolds_to_gigabytes_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"x" * 3_000_000 + b'"}'))
    (tmp_path / "b.txt").write_text("The fee is due.")
    documents, problems = read_corpus(str(tmp_path), max_mb=1, progress=False)
    assert [d.id for d in documents] == ["b.txt"]
    assert problems == [{"file": "a.jsonl.gz", "reason": "unfolds to more than 1 MB; raise `max_mb`, or split it"}]


def test_a_filled_in_field_of_a_page_is_a_word_of_its_own():
    assert parse_html("<p><label>Name</label><textarea>Ann</textarea>Thanks</p>").text.split() == [
        "Name",
        "Ann",
        "Thanks",
    ]
