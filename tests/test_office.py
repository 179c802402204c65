"""Word, PowerPoint and Excel files: what a person reads in them is in the text, and what is not is named."""

import datetime
import io
import re
import struct
import unicodedata
import zipfile
from html import escape
from pathlib import Path

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl.cell.rich_text import CellRichText, TextBlock
from openpyxl.cell.text import InlineFont
from openpyxl.chart import BarChart, Reference
from openpyxl.comments import Comment
from PIL import Image
from pptx import Presentation
from pptx.chart.data import CategoryChartData
from pptx.enum.chart import XL_CHART_TYPE
from pptx.util import Inches

from llmops.foundation.reading import DataError, check_rows
from llmops.retrieval.documents import IngestError, UnreadableFile, heading_at, source_reference
from llmops.retrieval.ingestion import read_corpus, read_document

OLE = bytes.fromhex("d0cf11e0a1b11ae1")
NAMESPACES = {
    "w": "http://schemas.openxmlformats.org/wordprocessingml/2006/main",
    "m": "http://schemas.openxmlformats.org/officeDocument/2006/math",
    "mc": "http://schemas.openxmlformats.org/markup-compatibility/2006",
    "v": "urn:schemas-microsoft-com:vml",
    "o": "urn:schemas-microsoft-com:office:office",
    "r": "http://schemas.openxmlformats.org/officeDocument/2006/relationships",
    "a": "http://schemas.openxmlformats.org/drawingml/2006/main",
    "wp": "http://schemas.openxmlformats.org/drawingml/2006/wordprocessingDrawing",
    "pic": "http://schemas.openxmlformats.org/drawingml/2006/picture",
    "wps": "http://schemas.microsoft.com/office/word/2010/wordprocessingShape",
}
TYPES = (
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Override PartName="/word/document.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
)


def part(content: str, kind: str = "document") -> str:
    "A part of a Word file."
    names = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in NAMESPACES.items())
    content = f"<w:body>{content}</w:body>" if kind == "document" else content
    return f'<?xml version="1.0" encoding="UTF-8"?><w:{kind} {names}>{content}</w:{kind}>'


def run(text: str, properties: str = "") -> str:
    "A run of text."
    return f'<w:r><w:rPr>{properties}</w:rPr><w:t xml:space="preserve">{escape(text)}</w:t></w:r>'


def para(content: str, style: str = "", number: str = "") -> str:
    "A paragraph; `number` is a list and a level, e.g. `1.0`."
    properties = f'<w:pStyle w:val="{style}"/>' if style else ""
    if number:
        ident, level = number.split(".")
        properties += f'<w:numPr><w:ilvl w:val="{level}"/><w:numId w:val="{ident}"/></w:numPr>'
    return f"<w:p><w:pPr>{properties}</w:pPr>{content}</w:p>"


def table(*rows: list[str]) -> str:
    "A table of cells."
    made = "".join("<w:tr>" + "".join(f"<w:tc>{para(cell)}</w:tc>" for cell in row) + "</w:tr>" for row in rows)
    return f"<w:tbl>{made}</w:tbl>"


def write_word(path: Path, body: str, types: str = TYPES, **parts: str) -> Path:
    "A Word file of a body and further parts."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("[Content_Types].xml", types)
        package.writestr("word/document.xml", part(body))
        for name, content in parts.items():
            package.writestr(f"word/{name.replace('__', '/')}.xml", content)
    return path


def reports(path: Path) -> dict[str, str]:
    "What the report of a corpus says, without the file's name."
    _, problems = read_corpus(str(path), progress=False)
    return {p["file"].removeprefix(f"{path.name}, "): p["reason"] for p in problems}


def text_of(tmp_path: Path, body: str, **parts: str) -> str:
    "The text of a Word file."
    return read_document(write_word(tmp_path / "a.docx", body, **parts))[0].text


# Word


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="\ufdd0"))
        .map(lambda t: " ".join(t.replace("\ufffe", "").replace("\uffff", "").split()))
        .filter(lambda t: re.search(r"\w", t)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(
        ["{}", "<w:ins>{}</w:ins>", "<w:fldSimple>{}</w:fldSimple>", "<w:bdo>{}</w:bdo>", "<w:dir>{}</w:dir>"]
    ),
)
def test_any_text_of_a_word_file_comes_back(tmp_path_factory, lines, wrapped):
    folder = tmp_path_factory.mktemp("word")
    text = text_of(folder, "".join(para(wrapped.format(run(line))) for line in lines))
    expected = [unicodedata.normalize("NFC", line.replace("\ufeff", "")) for line in lines]
    assert text.split("\n\n") == [" ".join(line.split()) for line in expected]


RAISED = '<w:style w:type="character" w:styleId="{}"><w:name w:val="{}"/>{}</w:style>'
STYLES = part(
    RAISED.format("Up", "Hochgestellt", '<w:rPr><w:vertAlign w:val="superscript"/></w:rPr>')
    + RAISED.format("Upper", "Upper", '<w:basedOn w:val="Up"/>')
    + '<w:style w:type="paragraph" w:styleId="1"><w:name w:val="heading 1"/></w:style>'
    + '<w:style w:type="paragraph" w:styleId="x1"><w:name w:val="제목 \'A\'"/><w:basedOn w:val="1"/></w:style>'
    + '<w:style w:type="paragraph" w:styleId="T"><w:name w:val="Title"/></w:style>'
    + '<w:style w:type="paragraph" w:styleId="jo"><w:name w:val="조"/><w:pPr><w:numPr><w:numId w:val="1"/></w:numPr>'
    '<w:outlineLvl w:val="1"/></w:pPr></w:style>',
    "styles",
)


@pytest.mark.parametrize(
    "exponent",
    [
        '<w:vertAlign w:val="superscript"/>',
        '<w:rStyle w:val="Up"/>',
        '<w:rStyle w:val="Upper"/>',
        '<w:position w:val="8"/>',
    ],
)
def test_a_raised_number_stays_raised(tmp_path, exponent):
    assert (
        text_of(tmp_path, para(run("At most 10") + run("2", exponent) + run(" m.")), styles=STYLES) == "At most 10^2 m."
    )


def test_changes_and_hidden_words(tmp_path):
    body = (
        para(
            run("The fee is ")
            + "<w:del><w:r><w:delText>7</w:delText></w:r></w:del>"
            + f"<w:ins>{run('9')}</w:ins>"
            + run(" €.")
        )
        + para(run("Not shown.", "<w:vanish/>") + run("Shown.", '<w:vanish w:val="0"/>'))
        + f"<w:moveFrom>{run('gone')}</w:moveFrom>"
        + para("<w:moveTo>" + run("Moved.") + "</w:moveTo>")
    )
    assert text_of(tmp_path, body) == "The fee is 9 €.\n\nShown.\n\nMoved."
    assert reports(tmp_path / "a.docx") == {"hidden text": "hidden; unhide it to have it read"}


def test_headings_of_any_style_and_the_numbers_that_word_counts(tmp_path):
    level = '<w:lvl w:ilvl="{}"><w:start w:val="1"/><w:numFmt w:val="{}"/>{}<w:lvlText w:val="{}"/></w:lvl>'
    lists = part(
        '<w:abstractNum w:abstractNumId="0">'
        + level.format(0, "decimal", '<w:pStyle w:val="jo"/>', "제%1조")
        + level.format(1, "lowerLetter", "", "(%2)")
        + level.format(2, "upperRoman", "<w:isLgl/>", "%1.%2.%3")
        + '</w:abstractNum><w:abstractNum w:abstractNumId="1">'
        + level.format(0, "bullet", "", "•")
        + '</w:abstractNum><w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>'
        '<w:num w:numId="2"><w:abstractNumId w:val="1"/></w:num>',
        "numbering",
    )
    body = (
        para(run("Card terms"), "T")
        + para(run("환불"), "jo")
        + para(run("first"), number="1.1")
        + para(run("second"), number="1.1")
        + para(run("A word between."))
        + para(run("third"), number="1.1")
        + para(run("deep"), number="1.2")
        + para(run("수수료"), "jo")
        + para(run("one"), number="1.1")
        + para(run("dot"), number="2.0")
        + para(run("Annex"), "x1")
    )
    document = read_document(write_word(tmp_path / "a.docx", body, styles=STYLES, numbering=lists))[0]
    assert document.text == (
        "Card terms\n\n제1조 환불\n\n(a) first\n(b) second\n\nA word between.\n\n(c) third\n1.3.1 deep\n\n"
        "제2조 수수료\n\n(a) one\n\n- dot\n\nAnnex"
    )
    assert document.title == "Card terms" and not document.metadata.get("left_out")
    assert [heading for _, heading in document.headings] == [
        "Card terms",
        "Card terms > 제1조 환불",
        "Card terms > 제2조 수수료",
        "Annex",
    ]
    assert heading_at(document, document.text.index("second")) == "Card terms > 제1조 환불"


def test_check_boxes_and_cells_over_several_rows(tmp_path):
    word = 'xmlns:x="http://schemas.microsoft.com/office/word/2010/wordml"'
    box = "<w:sdt {}><w:sdtPr><x:checkbox><x:checked x:val='{}'/></x:checkbox></w:sdtPr><w:sdtContent>{}</w:sdtContent></w:sdt>"
    boxes = [box.format(word, n, run("?")) + run(text) for n, text in enumerate(("no", "yes"))]
    cells = table([run("Basic"), run("5 €")], ["", run("6 €")])
    merged = cells.replace("<w:tc>", '<w:tc><w:tcPr><w:vMerge w:val="restart"/></w:tcPr>', 1)
    merged = merged.replace("<w:tc><w:p><w:pPr></w:pPr></w:p>", "<w:tc><w:tcPr><w:vMerge/></w:tcPr><w:p/>", 1)
    text = text_of(tmp_path, para(boxes[0]) + para(boxes[1]) + merged)
    assert text == "☐ no\n\n☒ yes\n\nBasic | 5 €\nBasic | 6 €"


def graphic(uri: str, inside: str = "") -> str:
    "A drawing."
    data = f'<a:graphicData uri="http://schemas.openxmlformats.org/drawingml/2006/{uri}">{inside}</a:graphicData>'
    return f"<w:r><w:drawing><wp:inline><a:graphic>{data}</a:graphic></wp:inline></w:drawing></w:r>"


def test_what_a_word_file_holds_beside_its_paragraphs(tmp_path):
    box = f"<w:txbxContent>{para(run('In a box.'))}</w:txbxContent>"
    drawn = graphic("shape", f"<wps:wsp><wps:txbx>{box}</wps:txbx></wps:wsp>")
    twice = (
        "<w:r><mc:AlternateContent><mc:Choice>"
        + drawn[5:-6].replace("In a box", "In both")
        + "</mc:Choice><mc:Fallback><w:pict><v:shape><v:textbox>"
        + box.replace("In a box", "In both")
        + "</v:textbox></v:shape></w:pict></mc:Fallback></mc:AlternateContent></w:r>"
    )
    field = "".join(f'<w:r><w:fldChar w:fldCharType="{k}"/></w:r>' for k in ("begin", "separate"))
    field = field.replace("</w:r><w:r>", "</w:r><w:r><w:instrText> PAGE </w:instrText></w:r><w:r>", 1)
    footer = part(
        para(run("Terms of 2025. ") + field + run("3") + '<w:r><w:fldChar w:fldCharType="end"/></w:r>'), "ftr"
    )
    body = (
        para(
            run("A fee")
            + '<w:r><w:footnoteReference w:id="2"/></w:r>'
            + run(" of 5 €")
            + '<w:r><w:commentReference w:id="0"/></w:r>'
        )
        + table([run("Plan"), run("Fee")], [run("Basic"), run("10") + run("2", '<w:vertAlign w:val="superscript"/>')])
        + para(drawn + twice + graphic("picture", "<pic:pic/>") + graphic("chart") + graphic("diagram"))
        + para('<w:r><w:object><v:shape><v:imagedata r:id="r9"/></v:shape><o:OLEObject/></w:object></w:r>')
        + para(
            "<m:oMath><m:sSup><m:e><m:r><m:t>x</m:t></m:r></m:e><m:sup><m:r><m:t>2</m:t></m:r></m:sup></m:sSup></m:oMath>"
        )
        + para(run("one") + "<w:r><w:cr/></w:r>" + run("two") + "<w:r><w:tab/></w:r>" + run("three"))
        + para(f"<w:r><w:ruby><w:rt>{run('かん')}</w:rt><w:rubyBase>{run('漢')}</w:rubyBase></w:ruby></w:r>")
        + para('<w:hyperlink w:anchor="x">' + run("a link") + "</w:hyperlink>")
    )
    parts = {
        "footnotes": part('<w:footnote w:id="2">' + para(run("Without tax.")) + "</w:footnote>", "footnotes"),
        "comments": part('<w:comment w:id="0" w:author="Bo">' + para(run("Why?")) + "</w:comment>", "comments"),
        "header1": part(para(run("ACME Bank")), "hdr"),
        "header2": part(para(run("ACME Bank")), "hdr"),
        "footer1": footer,
    }
    text = text_of(tmp_path, body, **parts)
    assert text == (
        "A fee [1] of 5 €\n\nPlan | Fee\nBasic | 10^2\n\nIn a box.\n\nIn both.\n\nx^2\n\none\ntwo three\n\n漢\n\na link\n\n"
        "Terms of 2025.\n\nACME Bank\n\n1. Without tax."
    )
    assert set(reports(tmp_path / "a.docx")) == {
        "1 picture",
        "1 chart",
        "1 diagram",
        "1 embedded object",
        "1 equation",
        "1 comment",
    }


# PowerPoint


def picture() -> io.BytesIO:
    "A small picture."
    made = io.BytesIO()
    Image.new("RGB", (4, 4)).save(made, "png")
    made.seek(0)
    return made


def test_a_deck_is_read_slide_by_slide(tmp_path):
    deck = Presentation()
    first = deck.slides.add_slide(deck.slide_layouts[1])
    first.shapes.title.text = "Fees & charges"
    first.placeholders[1].text = "The fee is 10"
    raised = first.placeholders[1].text_frame.paragraphs[0].add_run()
    raised.text, raised.font._element.attrib["baseline"] = "2", "30000"
    first.notes_slide.notes_text_frame.text = "Say it slowly."
    deck.slides.add_slide(deck.slide_layouts[6]).shapes.add_picture(picture(), 0, 0)
    third = deck.slides.add_slide(deck.slide_layouts[6])
    inner = third.shapes.add_group_shape().shapes.add_group_shape().shapes
    inner.add_textbox(0, 0, 9, 9).text_frame.text = "환불은 14일"
    grid = third.shapes.add_table(2, 2, 0, 0, Inches(4), Inches(1)).table
    grid.cell(0, 0).text, grid.cell(0, 1).text, grid.cell(1, 1).text = "Plan", "5 €", "6 €"
    grid.cell(0, 0).merge(grid.cell(1, 0))
    data = CategoryChartData()
    data.categories = ["a"]
    data.add_series("s", [1])
    third.shapes.add_chart(XL_CHART_TYPE.PIE, 0, 0, Inches(2), Inches(2), data)
    hidden = deck.slides.add_slide(deck.slide_layouts[5])
    hidden.shapes.title.text = "Old fees"
    hidden._element.set("show", "0")
    deck.save(tmp_path / "a.PPTX")
    document = read_document(tmp_path / "a.PPTX")[0]
    assert document.text == (
        "Fees & charges\n\nThe fee is 10^2\n\nNotes: Say it slowly.\n\nSlide 3\n\n환불은 14일\n\nPlan | 5 €\nPlan | 6 €"
    )
    assert document.title == "Fees & charges"
    places = {words: source_reference(document, document.text.index(words)) for words in ("10^2", "환불")}
    assert places == {"10^2": "a.PPTX, slide 1", "환불": "a.PPTX, slide 3"}
    assert heading_at(document, document.text.index("환불")) == "Slide 3"
    assert reports(tmp_path / "a.PPTX") == {
        "slide 2, 1 picture": "words in pictures are not read",
        "slide 3, 1 chart": "charts are not read",
        "slide 4": "hidden; unhide it to have it read",
    }


# Excel


def change_part(path: Path, name: str, old: bytes, new: bytes) -> None:
    "Replace what matches in a part of a file."
    with zipfile.ZipFile(path) as package:
        parts = {part: package.read(part) for part in package.namelist()}
    assert re.search(old, parts[name])
    parts[name] = re.sub(old, new, parts[name])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        for part, data in parts.items():
            package.writestr(part, data)


def test_a_workbook_is_read_as_excel_shows_it(tmp_path):
    book = openpyxl.Workbook()
    fees = book.active
    fees.title = "Fees"
    rows = [
        ["Plan", "Share", "Price", "From", "Code", "Open"],
        ["Basic", 0.05, 1234.5, datetime.date(2025, 1, 6), 7, True],
        [None, 0.1 + 0.2, -3, datetime.datetime(2025, 1, 6, 9, 30), 1e15, None],
        [],
        ["=1+1", "two\nlines", "#N/A"],
    ]
    for row in rows:
        fees.append(row)
    for place, code in {"B2": "0.0%", "C2": '#,##0.00\\ "€"', "E2": "00000"}.items():
        fees[place].number_format = code
    fees.merge_cells("A2:A3")
    fees["A1"].comment = Comment("Why?", "Bo")
    fees["F5"] = CellRichText("10", TextBlock(InlineFont(vertAlign="superscript"), "2"))
    chart = BarChart()
    chart.add_data(Reference(fees, min_col=2, min_row=1, max_row=3))
    fees.add_chart(chart, "H1")
    book.create_sheet("Empty")
    book.create_sheet("Old").append(["x"])
    book["Old"].sheet_state = "veryHidden"
    book.create_sheet("지점").append(["서울", None, "Bo"])
    book.save(tmp_path / "a.xlsx")
    document = read_document(tmp_path / "a.xlsx")[0]
    assert document.text == (
        "Fees\nPlan | Share | Price | From | Code | Open\nBasic | 5.0% | 1,234.50 € | 2025-01-06 | 00007 | TRUE\n"
        "Basic | 0.3 | -3 | 2025-01-06 09:30:00 | 1000000000000000\n| two lines | #N/A | | | 10^2\n\n지점\n서울 | | Bo"
    )
    assert source_reference(document, document.text.index("서울")) == "a.xlsx, sheet 지점"
    assert heading_at(document, document.text.index("5.0%")) == "Fees"
    found = reports(tmp_path / "a.xlsx")
    assert set(found) == {"sheet Fees", "sheet Old", "1 chart", "1 comment"}
    assert found["sheet Fees"].startswith("1 formula without a value (A5)")


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(0, 4), st.booleans())
def test_a_number_is_written_as_its_format_says(value, places, thousands):
    from llmops.foundation.workbooks import number_text

    code = ("#,##0" if thousands else "0") + ("." + "0" * places if places else "")
    number = value / 10**places
    assert number_text(number, code) == f"{number:{',' if thousands else ''}.{places}f}"


def test_zeros_that_were_not_computed_and_characters_that_xml_cannot_hold(tmp_path):
    book = openpyxl.Workbook()
    for row in (["Sum", "=1+1"], ["a_x000D_b_x005F_x000D_", "x"]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    change_part(tmp_path / "a.xlsx", "xl/worksheets/sheet1.xml", rb"</f><v ?/>|</f><v></v>", b"</f><v>0</v>")
    assert read_document(tmp_path / "a.xlsx")[0].text == "Sheet\nSum\na b_x000D_ | x"
    assert "1 formula without a value (B1)" in reports(tmp_path / "a.xlsx")["sheet Sheet"]
    change_part(tmp_path / "a.xlsx", "xl/workbook.xml", rb'fullCalcOnLoad="1"', b"")
    assert read_document(tmp_path / "a.xlsx")[0].text == "Sheet\nSum | 0\na b_x000D_ | x"


def test_a_sheet_that_says_wrong_things_about_its_size(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["A fee of 5 €"])
    book.save(tmp_path / "a.xlsx")
    sheet = "xl/worksheets/sheet1.xml"
    change_part(tmp_path / "a.xlsx", sheet, rb'<dimension ref="[^"]*"', b'<dimension ref="A1:XFD1048576"')
    far = b'<row r="999999999999"><c r="A999999999999"><v>1</v></c></row></sheetData>'
    change_part(tmp_path / "a.xlsx", sheet, b"</sheetData>", far)
    assert read_document(tmp_path / "a.xlsx")[0].text == "Sheet\nA fee of 5 €"


def test_a_workbook_is_a_table_of_questions(tmp_path):
    book = openpyxl.Workbook()
    for row in (["passage", "question", "answer"], ["The fee is 5 %.", "How high is the fee?", 0.05]):
        book.active.append(row)
    book.active["C2"].number_format = "0%"
    book.save(tmp_path / "qa.xlsx")
    fields = {name: name for name in ("passage", "question", "answer")}
    good, _ = check_rows(str(tmp_path / "qa.xlsx"), fields)
    assert [(row["answer"], row["where"]) for row in good] == [("5%", "qa.xlsx, row 2")]
    book.create_sheet("More").append(["x"])
    book.save(tmp_path / "qa.xlsx")
    with pytest.raises(DataError, match="qa.xlsx: expected one sheet with rows, got 2 .'Sheet', 'More'.; save each"):
        check_rows(str(tmp_path / "qa.xlsx"), fields)


# What cannot be read


def archive(**parts: str | bytes) -> bytes:
    "A zip archive."
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in parts.items():
            package.writestr(name, content)
    return made.getvalue()


def a_word_file(**parts: str | bytes) -> bytes:
    "A Word file."
    return archive(**{"[Content_Types].xml": TYPES, "word/document.xml": part(para(run("A fee."))), **parts})


def locked_zip() -> bytes:
    "An archive whose parts are marked as encrypted."
    data = bytearray(a_word_file())
    for mark, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        for found in re.finditer(re.escape(mark), bytes(data)):
            data[found.start() + at : found.start() + at + 2] = struct.pack("<H", 1)
    return bytes(data)


BROKEN = {
    "locked.docx": (
        lambda: OLE + "EncryptedPackage".encode("utf-16-le"),
        "locked with a password; save it without one",
    ),
    "zip.docx": (locked_zip, "locked with a password"),
    "old.doc": (lambda: OLE, "a .doc, the format of Word before 2007; open it and save it as .docx"),
    "old.xls": (lambda: OLE, "a .xls, the format of Excel before 2007; open it and save it as .xlsx"),
    "old.ppt": (lambda: OLE, "a .ppt, .*save it as .pptx"),
    "renamed.docx": (lambda: OLE + "WordDocument".encode("utf-16-le"), "format of before 2007 .*save it as .docx"),
    "text.odt": (lambda: b"PK", "a .odt, the format of LibreOffice .*save it as .docx"),
    "sheet.ods": (lambda: b"PK", "a .ods, .*save it as .xlsx"),
    "deck.odp": (lambda: b"PK", "a .odp, .*save it as .pptx"),
    "odt.docx": (
        lambda: archive(mimetype="application/vnd.oasis.opendocument.text"),
        "OpenDocument file.*save it as .docx",
    ),
    "zip.pptx": (lambda: archive(a="x"), "a zip archive, but no Office file"),
    "word.xlsx": (a_word_file, "a .docx by what is in it; name it so"),
    "page.docx": (lambda: b"<html>", "no .docx by what is in it"),
    "empty.pptx": (lambda: b"", "empty"),
    "cut.docx": (lambda: a_word_file()[:-40], "not a whole .docx"),
    "half.docx": (lambda: a_word_file()[:300], "not a whole .docx"),
    "nobody.docx": (
        lambda: archive(**{"[Content_Types].xml": TYPES}),
        "not a whole .docx .its main part 'word/document.xml' is missing",
    ),
    "xml.docx": (lambda: a_word_file(**{"word/styles.xml": "<x>"}), "not a .docx that can be read"),
    "bomb.docx": (
        lambda: a_word_file(**{"word/x.xml": bytes(60_000_000)}),
        "unfolds to 60 MB of text, more than the 50 MB",
    ),
    "nothing.docx": (lambda: a_word_file(**{"word/document.xml": part(para(""))}), "no text in it"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_cannot_be_read_is_named(tmp_path, name):
    make, reason = BROKEN[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(UnreadableFile, match=f"^{name}: .*{reason}"):
        read_document(tmp_path / name)


def test_a_folder_of_office_files(tmp_path):
    macro = TYPES.replace(
        "vnd.openxmlformats-officedocument.wordprocessingml.document", "vnd.ms-word.document.macroEnabled"
    )
    for name, types in (("a.DOCX", TYPES), ("b.docm", macro), ("~$a.docx", TYPES)):
        write_word(tmp_path / name, para(run("A fee.")), types)
    book = openpyxl.Workbook()
    book.active.append(["x" * 30])
    book.save(tmp_path / "big.xlsm")
    documents, problems = read_corpus(str(tmp_path), progress=False, max_mb=0.006)
    assert [(d.id, d.title, d.text[:6]) for d in documents] == [
        ("a.DOCX", "a", "A fee."),
        ("b.docm", "b", "A fee."),
        ("big.xlsm", "big", "Sheet\n"),
    ]
    assert {p["file"]: p["reason"][:6] for p in problems} == {"~$a.docx": "hidden"}
    with pytest.raises(IngestError, match="its sheets hold more text than is read of a file; raise `max_mb`"):
        from llmops.retrieval.office import parse_office

        parse_office(tmp_path / "big.xlsm", "big.xlsm", limit=20)
