"Splits: those of the embedded example never change; few and uneven groups come near the shares, and none crosses."

import hashlib
import json
import random
from collections import Counter

import pytest

from llmops.foundation.artifacts import EMBEDDED_DATA
from llmops.foundation.reading import Row, check_rows
from llmops.foundation.splits import assign_groups, count_rows, share_notes, slack_rows, split_rows

COLUMNS = {name: name for name in ("passage", "question", "answer")}
EMBEDDED = {  # split -> rows, and the first digits of the sha256 of the file
    "train": (696, "c668f33337f370d8"),
    "valid": (72, "a9edab348dc1da1f"),
    "test": (232, "0b82110ad571230e"),
}
SIXTY = {  # the first 60 rows with the shares of the smoke profile
    "train": (36, "f039933de10b3c24"),
    "valid": (6, "f8470c2932e12cd7"),
    "test": (18, "b21eec1a195d7e60"),
}


def uneven_rows(seed: int, rows: int = 60) -> list[Row]:
    "Questions on passages of which a few have many."
    rng, made = random.Random(seed), []
    while len(made) < rows:
        words = " ".join(rng.choices([f"w{i}" for i in range(500)], k=30))
        for _ in range(min(rows - len(made), 12, int(rng.paretovariate(0.9)))):
            made.append({"passage": words, "question": f"What of {rng.random()}?", "answer": "w", "where": ""})
    return made


def sizes_of(splits: dict[str, list[Row]]) -> dict[str, int]:
    return {name: len(part) for name, part in splits.items()}


@pytest.mark.parametrize(("limit", "test", "valid", "wanted"), [(None, 0.24, 0.06, EMBEDDED), (60, 0.25, 0.15, SIXTY)])
def test_the_embedded_splits_are_the_same_bytes(
    limit: int | None, test: float, valid: float, wanted: dict[str, tuple[int, str]]
) -> None:
    rows, _ = check_rows(EMBEDDED_DATA, COLUMNS)
    splits, _ = split_rows(rows[:limit], 42, test, valid)
    for name, part in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        assert (len(part), hashlib.sha256(text.encode()).hexdigest()[:16]) == wanted[name]


@pytest.mark.parametrize("seed", range(12))
def test_sixty_uneven_rows_come_near_the_shares_or_it_is_said(seed: int) -> None:
    splits, removed = split_rows(uneven_rows(seed), 42, 0.24, 0.06)
    sizes = sizes_of(splits)
    assert sum(sizes.values()) == 60 and not removed and all(sizes.values())
    near = 11 <= sizes["test"] <= 18 and 2 <= sizes["valid"] <= 5
    assert near == (share_notes(splits, 0.24, 0.06) == []), sizes
    groups = [{row["group"] for row in part} for part in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_large_groups_do_not_eat_the_test_split() -> None:
    "Whatever the seed."
    sizes = {f"g{i}": size for i, size in enumerate([25, *[1] * 35])}
    tested = [count_rows(assign_groups(sizes, seed, 0.24, 0.06), sizes, "test") for seed in range(300)]
    assert 11 <= min(tested) and max(tested) <= 18


def test_a_share_that_cannot_be_had_is_said_with_the_reason() -> None:
    rows = [row | {"passage": f"passage number {i // 20}"} for i, row in enumerate(uneven_rows(1))]
    splits, _ = split_rows(rows, 42, 0.24, 0.06)
    assert sizes_of(splits) == {"train": 20, "valid": 20, "test": 20}
    test, valid = share_notes(splits, 0.24, 0.06)
    assert test.startswith("test has 20 of 60 rows (33%), 24% was asked for: the rows have 3 passages, the largest")
    assert valid.startswith("valid has 20 of 60 rows (33%), 6% was asked for")


def test_added_rows_move_few() -> None:
    "From 60 rows to 600, one at a time: how many of the older rows change their split."
    passages, moved, before = [row["passage"] for row in uneven_rows(3, 600)], [], dict[str, str]()
    for n in range(60, 601):
        sizes = Counter(passages[:n])
        now = assign_groups(sizes, 42, 0.24, 0.06)
        moved.append(sum(sizes[passage] for passage, place in before.items() if now[passage] != place))
        before = now
    assert sum(map(bool, moved)) <= 60 and sum(moved) <= 200 and max(moved) <= 24  # in 541 steps


def test_near_shares_move_nothing() -> None:
    sizes = {f"g{i}": 1 for i in range(5000)}
    more = sizes | {f"h{i}": 3 for i in range(100)}
    before, after = (assign_groups(groups, 42, 0.24, 0.06) for groups in (sizes, more))
    assert {group: after[group] for group in before} == before
    assert Counter(before.values())["test"] == pytest.approx(1200, abs=slack_rows(0.24, 5000))


def test_rows_without_a_passage_are_spread() -> None:
    "Their question puts them into a group, not the passage that all of them lack."
    rows = [row | {"passage": ""} for row in uneven_rows(4)]
    splits, _ = split_rows(rows, 42, 0.24, 0.06)
    assert len({row["group"] for part in splits.values() for row in part}) == 60
    assert share_notes(splits, 0.24, 0.06) == []


def test_rows_of_two_groups_that_became_one() -> None:
    "A passage near two groups of one split joins the first; near two splits it is set aside, also after groups moved."
    rng = random.Random(7)
    word = [f"w{i}" for i in range(300)]
    for trial in range(30):
        one = rng.choices(word, k=24)
        other = [*one[:20], *rng.choices(word, k=4)]
        middle = [*one[:22], *other[22:]]
        passages = [one, other, middle, *(rng.choices(word, k=24) for _ in range(9))]
        rows = [
            {"passage": " ".join(p), "question": f"What of {i} {j}?", "answer": p[0], "where": ""}
            for i, p in enumerate(passages)
            for j in range(1 + 4 * (i % 3))
        ]
        splits, removed = split_rows(rows, trial, 0.24, 0.12, threshold=0.7)
        assert sum(sizes_of(splits).values()) + len(removed) == len(rows)
        places: dict[str, set[str]] = {}
        for name, part in splits.items():
            for row in part:
                places.setdefault(row["group"], set()).add(name)
        assert all(len(found) == 1 for found in places.values())
