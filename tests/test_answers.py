"""Texts in every script: folded alike, told apart by what carries meaning, and scored as SQuAD and KorQuAD score them."""

import re
import string
import unicodedata
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmops.foundation.answers import (
    answer_f1,
    exact_match,
    is_refusal,
    normalize_answer,
    score_answer,
    squad_exact_match,
    squad_f1,
    summarize_scores,
)
from llmops.foundation.curation import duplicate_of, group_id, group_texts, normalize_text, split_words, text_id
from llmops.foundation.splits import split_documents, split_rows
from llmops.foundation.text import fold_text, fold_with_offsets, source_span
from llmops.retrieval.grounding import Packed, Passage, retrieved_row

few = settings(max_examples=150, deadline=None, derandomize=True)
ODD = (
    "aZ 19.,:-–−'“”「」²³⁻₂½①⑩㎡\u0301\u0323\u0345\u0338\u200b\u00ad\u202e\ufe0f각가ᄀㅏᆨㄱ´ﬁ℃=<αΐİßか\u3099कि٣٫+#%$()!?"
)
texts = st.text(alphabet=st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=12)
phrases = st.lists(
    st.sampled_from(
        "the a an Tower tower. 10th-century 1,200 1200 3.5 35 -5 5 % $1.50 C C++ C# o'clock 서울은 서울 1988년 東京 ソウル "
        "unknown - – ( ) & 2:30 A U.S. well-known की कि".split()
    ),
    max_size=6,
).map(" ".join)


@few
@given(texts, st.booleans())
def test_folding_is_done_once_and_finds_the_way_back(text: str, case: bool) -> None:
    folded, offsets = fold_with_offsets(text, case)
    assert folded == fold_text(text, case) == fold_text(folded, case)
    assert len(offsets) == len(folded) + 1 and offsets == sorted(offsets) and offsets[-1] == len(text)
    for form in ("NFC", "NFD"):
        assert fold_text(unicodedata.normalize(form, text), case) == folded


@few
@given(st.lists(st.sampled_from(["s", "e", "o", "ﬁ", "㎡", "é", "각"]), min_size=1, max_size=6).map("".join), texts)
def test_what_is_found_in_a_folded_text_is_shown_in_the_original(wanted: str, around: str) -> None:
    "Characters that are not seen, put between any two, change nothing of what is found."
    hidden = "\u200b".join(unicodedata.normalize("NFD", wanted))
    text = f"{around} {hidden} {around}"
    folded, offsets = fold_with_offsets(text)
    start = folded.index(f" {fold_text(wanted)} ") + 1
    first, end = source_span(offsets, start, start + len(fold_text(wanted)))
    assert fold_text(text[first:end]) == fold_text(wanted)


@pytest.mark.parametrize("number", ["10²", "10₂", "1½", "①②", "⑫", "2㋀", "10⁻⁵", "⒈5", "1⁄2", "٣٫٥", "H₂2", "x₋1"])
def test_no_character_becomes_part_of_another_number(number: str) -> None:
    others = ["102", "10 2", "11/2", "12", "21月", "10-5", "1.5", "12", "35", "H22", "x-1"]
    same = {"1⁄2": "1/2", "٣٫٥": "3.5", "⑫": "12"}
    assert number in same or fold_text(number) not in [fold_text(other) for other in others]
    assert fold_text(number) == fold_text(same.get(number, number))


# ---- which texts are the same


@few
@given(texts)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalize_text(normalize_text(text)) == normalize_text(text)
    assert text_id(text) == text_id(normalize_text(text))


SIGNS = "+-±=<>%$€£°#&@*/^|~×÷§"
LETTERS = "abxyzéßжあ서한कखिीुقथ"
DIGITS = "0123456789"


@few
@given(
    st.sampled_from(
        ["What is {}?", "What is {} times 3?", "{} degrees", "Is {} more than {} or not", "In {}, who won?"]
    ),
    st.sampled_from(DIGITS + "xyz"),
    st.text(alphabet=SIGNS, max_size=2),
    st.text(alphabet=SIGNS, max_size=2),
    st.sampled_from(["", " "]),
)
def test_two_questions_that_differ_in_a_sign_stay_two(form: str, operand: str, one: str, other: str, gap: str) -> None:
    assume(one != other)
    for pair in ((one + gap + operand, other + gap + operand), (operand + gap + one, operand + gap + other)):
        first, second = (form.format(part, part) for part in pair)
        assert normalize_text(first) != normalize_text(second)


@few
@given(st.lists(st.sampled_from(LETTERS + DIGITS + SIGNS), min_size=2, max_size=8), st.data())
def test_two_texts_that_differ_in_one_character_stay_two(chars: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(chars) - 1))
    new = data.draw(st.sampled_from(LETTERS + DIGITS + SIGNS))
    changed = [*chars[:place], new, *chars[place + 1 :]]
    assume(fold_text("".join(chars)) != fold_text("".join(changed)))
    assert normalize_text("".join(chars)) != normalize_text("".join(changed))


@few
@given(
    st.lists(st.sampled_from("who wrote the first compiler for Paris हिन्दी 서울 42".split()), min_size=1, max_size=6)
)
def test_case_spacing_quotes_and_final_punctuation_are_forgiven(words: list[str]) -> None:
    plain = " ".join(words)
    for same in (
        plain.upper(),
        "  " + "\u00a0 ".join(words),
        f"“{plain}”",
        f"「{plain}」",
        plain + "?",
        plain + " …",
        plain + "。",
    ):
        assert normalize_text(same) == normalize_text(plain), same


numbers = st.one_of(
    st.integers(0, 10**7).map(str),
    st.integers(0, 10**7).map("{:,}".format),
    st.decimals(0, 10**4, places=2).map(str),
    st.decimals(0, 10**4, places=1).map("{:,}".format),
).flatmap(lambda n: st.sampled_from([n, f"-{n}", f"−{n}", f"- {n}"]))


def value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("−", "-").replace(" ", ""))


@few
@given(numbers, numbers)
def test_no_two_numbers_become_one(one: str, other: str) -> None:
    if value(one) != value(other):
        assert normalize_text(one) != normalize_text(other)
        assert normalize_answer(one) != normalize_answer(other) and answer_f1(one, other) == 0


KEPT = [
    ("What is C?", "What is C++?", "What is C#?"),
    ("How much is 12 + 4?", "How much is 12 - 4?"),
    ("What falls at -5 °C?", "What falls at +5 °C?", "What falls at 5 °C?"),
    ("कि क्या है?", "की क्या है?", "का क्या है?"),
]


@pytest.mark.parametrize("questions", KEPT)
def test_no_row_is_lost_for_a_sign(questions: tuple[str, ...]) -> None:
    rows = [{"passage": "One passage for all of them.", "question": q, "answer": q, "where": q} for q in questions]
    splits, removed = split_rows(rows, seed=1, test=0.3, valid=0.1)
    assert not removed and len({r["id"] for part in splits.values() for r in part}) == len(questions)
    rows = [{"passage": q, "question": "What does it say?", "answer": q, "where": q} for q in questions]
    splits, removed = split_rows(rows, seed=1, test=0.3, valid=0.1)
    assert not removed, removed
    documents = [{"id": text_id(q), "text": q, "where": q} for q in (*questions, questions[0].upper())]
    splits, removed = split_documents(documents, 3, 1, seed=1)
    assert [r["kind"] for r in removed] == ["duplicate"]


def test_another_number_in_a_long_question_is_another_question() -> None:
    asked = "How many of all the people who lived in the old town by the river moved away for good in {}?"
    row = {"passage": "A passage.", "question": asked.format(1950), "answer": "12"}
    assert duplicate_of(row, [row | {"question": asked.format(1960), "answer": "15"}], 0.75) is None
    assert duplicate_of(row, [row | {"question": asked.format("1950 then"), "answer": "15"}], 0.75) == "near duplicate"
    assert duplicate_of(row, [row | {"answer": "-12"}], 0.75) == "conflicting answer"


def test_near_copies_stay_in_one_group_whatever_their_signs() -> None:
    groups = group_texts(["It is C.", "It is C++."], lambda group: "train")
    assert set(groups.values()) == {group_id("It is C.")} and len(groups) == 2
    assert split_words("It is -5 °C.") == ["it", "is", "5", "c"]


# ---- how right an answer is


def official_tokens(s: str) -> list[str]:
    "`normalize_answer` and `get_tokens` of SQuAD's evaluate-v2.0.py."
    s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", s).split()


def official_f1(a_gold: str, a_pred: str) -> float:
    "`compute_f1` of the same script."
    gold_toks, pred_toks = official_tokens(a_gold), official_tokens(a_pred)
    num_same = sum((Counter(gold_toks) & Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return float(gold_toks == pred_toks)
    precision, recall = num_same / len(pred_toks), num_same / len(gold_toks)
    return 0.0 if num_same == 0 else 2 * precision * recall / (precision + recall)


@few
@given(phrases, phrases)
def test_the_squad_figures_are_the_script_s(prediction: str, gold: str) -> None:
    "The script's answer to a question without one is the empty text; here it is the refusal."
    assume(official_tokens(prediction) and official_tokens(gold))
    empty = ["" if official_tokens(a) == ["unknown"] else a for a in (gold, prediction)]
    assert squad_f1(prediction, gold) == pytest.approx(official_f1(*empty))
    assert squad_exact_match(prediction, gold) == (official_tokens(prediction) == official_tokens(gold))


@few
@given(st.one_of(phrases, texts), st.one_of(phrases, texts))
def test_f1_is_symmetric_bounded_and_one_for_an_exact_match(one: str, other: str) -> None:
    assert answer_f1(one, other) == answer_f1(other, one) and 0 <= answer_f1(one, other) <= 1
    assert answer_f1(one, one) == 1 and exact_match(one, one)
    assert answer_f1(one, other) == 1 or not exact_match(one, other)
    assert bool(normalize_answer(one)) == bool(fold_text(one).split())


@few
@given(phrases)
def test_an_answer_in_other_characters_is_the_same(text: str) -> None:
    assume(text)
    wide = text.translate({i: i + 0xFEE0 for i in range(ord("0"), ord("9") + 1)})
    dashed = text.replace("-", "–")
    for same in (
        wide,
        dashed,
        unicodedata.normalize("NFD", text),
        text.upper().lower(),
        f"“{text}”",
        f"\u200b{text}\ufe0f",
    ):
        assert normalize_answer(same) == normalize_answer(text), same


@few
@given(st.text(alphabet="서울은대한민국의수도東京ソウルไทย", min_size=1, max_size=8), st.integers(1, 7))
def test_spacing_costs_nothing_where_characters_are_compared(text: str, place: int) -> None:
    assert exact_match(f"{text[:place]} {text[place:]}", text)
    assert 0 < answer_f1(text + "은", text) <= 1


DIFFERENT = [
    ("3.5 %", "35 %"),
    ("-5", "5"),
    ("$1.50", "$150"),
    ("2:30", "230"),
    ("C++", "C"),
    ("C#", "C"),
    ("A", ""),
    ("3,5", "35"),
    ("A+", "A-"),
    ("A-", "A"),
    ("1/2", "12"),
    ("5'3", "53"),
    ("vitamin A", "vitamin"),
    ("A형", "형"),
    ("12 - 4", "12 + 4"),
    (".5", "5"),
    ("10²", "102"),
    ("−40%", "40%"),
    ("5′", "5″"),
    ("1.000", "1000"),
    ("?", ""),
]
SAME = [
    ("1910–1940", "1910-1940"),
    ("1,000", "1000"),
    ("1,234,567.5", "1234567.5"),
    ("the U.S.", "US"),
    ("two - thirds", "two-thirds"),
    ("‘서울’", "서울"),
    ("『서울』", "서울"),
    ("３５％", "35 %"),
    ("대한 민국", "대한민국"),
    ("- 40 %", "-40%"),
    ("a 4-week period", "4 week period"),
    ("½", "1/2"),
    ("king’s", "King's"),
    ("١٢", "12"),
    ("東 京", "東京"),
    ("the A-Team", "A-Team"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_these_answers_differ(one: str, other: str) -> None:
    assert not exact_match(one, other) and answer_f1(one, other) < 1


@pytest.mark.parametrize(("one", "other"), SAME)
def test_these_answers_are_the_same(one: str, other: str) -> None:
    assert exact_match(one, other) and answer_f1(one, other) == 1


def test_korean_is_scored_by_characters() -> None:
    assert answer_f1("서울은", "서울") == pytest.approx(0.8)  # KorQuAD: two of three, two of two
    assert squad_f1("서울은", "서울") == 0


def test_the_best_of_several_references_counts() -> None:
    row = {"id": "1", "question": "When?", "answer": "1910", "answers": ["1910", "in 1910–1940"], "answerable": True}
    scored = score_answer(row, "1910-1940")
    assert scored["f1"] == pytest.approx(2 * 3 / 7) and scored["gold"] == "1910" and scored["answers"] == row["answers"]
    assert score_answer(row, "in 1910-1940")["exact_match"] and score_answer(row, "1910")["f1"] == 1
    assert "answers" not in score_answer(row | {"answers": ["1910"]}, "1910")
    again = score_answer(scored | {"answer": scored["gold"]}, "1910-1940")  # a scored row can be scored again
    assert again == scored
    summary = summarize_scores([scored], resamples=100)
    assert {"f1", "squad_f1", "squad_f1_low", "squad_exact_match"} <= set(summary) and summary["squad_f1"] == scored[
        "squad_f1"
    ]


def test_what_was_not_found_has_no_other_references() -> None:
    row = {
        "passage": "A fee of 5 euro.",
        "question": "How much?",
        "answer": "5 euro",
        "answers": ["5 euro", "five"],
        "answerable": True,
    }
    lost = retrieved_row(row, Packed("Other text.", (Passage("d", "Other text.", 0, "", "", "", 1.0),), (), 2))
    assert (
        score_answer(lost | {"id": "1"}, "five")["f1"] == 0 and score_answer(lost | {"id": "1"}, "unknown")["f1"] == 1
    )


def test_a_refusal_is_known_in_any_characters() -> None:
    assert all(
        is_refusal(text, "알 수 없음")
        for text in ("알 수 없음", "알수없음.", unicodedata.normalize("NFD", "「알 수 없음」"))
    )
    assert not is_refusal("+", "-") and not is_refusal("", "unknown")
