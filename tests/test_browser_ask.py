"""People ask on the server's page in a real Chromium. The server, the search and the page are the real ones; what the model says
about the documents is given, because the tiny model knows nothing. Where TOUR names a folder, pictures are put there."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from browsing import browser_page, keep_picture
from playwright.sync_api import Browser, Page, expect

from llmops.deployment.assistant import Assistant, find_trust
from llmops.deployment.admission import FrontDesk
from llmops.deployment.gateway import create_app
from llmops.deployment.keys import Key, add_key
from llmops.deployment.ledger import total_usage
from llmops.deployment.page import page_routes, read_feedback
from llmops.deployment.rag import DocumentsEngine, served_version
from llmops.deployment.sources import index_documents, open_collection
from llmops.deployment.streaming import AnswerLimits
from llmops.deployment.transformers_engine import TransformersEngine
from llmops.foundation.artifacts import input_digest
from llmops.foundation.checkpoints import model_path
from llmops.foundation.console import listen
from llmops.foundation.models import load_model

EVIL = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script>"
DOCUMENTS = {
    "fees.md": "# Accounts\n\n## Fees\n\nA new card costs 5 euro 💳 and comes by post.\n"
    "An overdraft costs 12.50 euro a month. It is due in May, and whoever pays late pays 3 euro more.\n",
    "환불.md": "# 환불 안내\n\n구매한 날부터 7일 안에 환불할 수 있습니다. 배송비는 고객이 냅니다.\n",
    "evil.txt": f"The gate opens at nine {EVIL} in the morning, every day of the week.\n",
}
KNOWN = {
    "overdraft": "12.50 euro",
    "card": "5 euro 💳",
    "환불": "7일",
    "gate": f"nine {EVIL}",
}


def know(messages, most, passages):
    "What a good model would say."
    question = messages[-1]["content"].rpartition("Question:")[2]
    if "slow" in question:
        time.sleep(1.5)
    return next((answer for word, answer in KNOWN.items() if word in question), "unknown"), -0.1


@pytest.fixture(scope="module")
def feedback(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("feedback") / "serving-feedback"


@pytest.fixture(scope="module")
def home(feedback, tmp_path_factory) -> Iterator[str]:
    "The address of a running server."
    folder = tmp_path_factory.mktemp("documents")
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    path = model_path("tiny:llama")
    limits = AnswerLimits(default_max_tokens=40)
    engine = TransformersEngine(*load_model(path, dtype="float32"), 1024, limits=limits)
    about = {"model": "assistant-4bit", "digest": input_digest(path), "source": str(path), "engine": "transformers"}
    collection = open_collection(index_documents(folder, tmp_path_factory.mktemp("kept"))[0])
    trust = find_trust("runs/nowhere", about["digest"], collection)
    asked = Assistant(replace(served_version(about, engine), ask=know), collection, trust)
    told = {"count": collection.documents, "digest": collection.digest, "note": trust.note}
    behind = about | {"model": "assistant-4bit+rag", "documents": told}
    pages = page_routes({about["model"]: about, behind["model"]: behind}, feedback)
    with running(create_app(about, engine, [(behind, DocumentsEngine(asked))], pages)) as address:
        yield address


@contextmanager
def running(app) -> Iterator[str]:
    "A server of its own, until the block ends."
    with listen(0) as socket:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{socket.getsockname()[1]}/"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def chromium() -> Iterator[tuple[Browser, list[str]]]:
    with browser_page() as (page, problems):
        browser = page.context.browser
        assert browser is not None
        yield browser, problems


@pytest.fixture
def page(chromium, home) -> Iterator[Page]:
    "A fresh page in English on a desktop; nothing may fail in it."
    with opened(chromium, home) as page:
        yield page


class opened:
    "A page of its own, in which nothing may fail unless the test says so."

    def __init__(self, chromium, home: str, fails: bool = False, **options) -> None:
        (self.browser, _), self.home, self.fails = chromium, home, fails
        self.options = {"locale": "en-US"} | options
        self.problems: list[str] = []

    def __enter__(self) -> Page:
        self.context = self.browser.new_context(**self.options)
        page = self.context.new_page()
        page.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.problems.append(str(e)))
        page.goto(self.home)
        expect(page.locator("#model option").first).to_be_attached()
        return page

    def __exit__(self, kind, *_) -> None:
        self.context.close()
        if kind is None and not self.fails:
            assert self.problems == []


def test_a_server_with_keys_asks_for_one_and_the_page_keeps_it(chromium):
    path, desk = model_path("tiny:llama"), FrontDesk()
    secret = add_key(desk.ledger, Key("ann"))
    engine = TransformersEngine(*load_model(path, dtype="float32"), 1024, limits=AnswerLimits(default_max_tokens=4))
    about = {"model": "m", "digest": "d1ge57", "source": str(path), "engine": "transformers"}
    app = create_app(about, engine, pages=page_routes({"m": about}), desk=desk)
    with running(app) as address, opened(chromium, address, fails=True) as page:  # the browser reports the 401
        asked: list[str] = []
        page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept(secret)))
        ask(page, "hello")
        ask(page, "hello again")
        assert asked == ["This server asks for a key:"]
    assert [row["requests"] for row in total_usage(desk.ledger)] == [2]


def ask(page: Page, question: str):
    "Ask, and wait for the end of the answer."
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")
    turn = page.locator("#talk > li").last
    expect(turn).to_have_attribute("aria-busy", "false", timeout=60_000)
    return turn


def test_an_answer_with_its_source(page):
    turn = ask(page, "What does an overdraft cost?")
    expect(turn.locator(".answer")).to_have_text("12.50 euro")
    source = turn.locator("details").first
    expect(source.locator(".place")).to_have_text("fees.md, line 6")
    expect(source.locator("summary mark")).to_have_text("12.50 euro")
    expect(source.locator("summary .sentence")).to_have_text("An overdraft costs 12.50 euro a month.")
    expect(source.locator(".passage")).to_be_hidden()
    source.locator("summary").click()
    expect(source.locator(".passage")).to_contain_text("A new card costs 5 euro 💳")
    expect(source.locator(".passage mark")).to_have_text("12.50 euro")
    expect(turn).to_contain_text("assistant-4bit+rag")
    expect(turn).to_contain_text("No threshold was fitted")
    keep_picture(page, "ask")


def test_a_mark_covers_words_and_keeps_its_place_behind_a_character_of_two_units(page):
    turn = ask(page, "What does a new card cost?")
    expect(turn.locator("details .passage mark").first).to_have_text("5 euro")
    turn = ask(page, "What does an overdraft cost?")  # 💳 stands before it, two units long in a browser
    expect(turn.locator("details .passage mark").first).to_have_text("12.50 euro")


def test_what_documents_and_people_write_is_text(page):
    turn = ask(page, f"When does the gate open? {EVIL}")
    expect(turn.locator(".asked")).to_contain_text(EVIL)
    expect(turn.locator("details").first).to_contain_text("<script>")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#talk img, #talk script").count() == 0


def test_unknown_is_said(page):
    turn = ask(page, "Who painted the tower?")
    expect(turn.locator(".answer")).to_have_text("unknown: no passage that was read says it surely enough")
    expect(turn.locator("details")).to_have_count(0)
    expect(turn).to_contain_text("Read: ")


def test_thumbs_are_kept(page, feedback):
    before = len(read_feedback(feedback))
    turn = ask(page, "What does an overdraft cost?")
    up, down = turn.get_by_role("button", name="Good answer"), turn.get_by_role("button", name="Bad answer")
    up.click()
    expect(up).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#note")).to_have_text("Kept. Thank you.")
    [*_, line] = read_feedback(feedback)
    assert (line["vote"], line["question"], line["answer"]) == ("up", "What does an overdraft cost?", "12.50 euro")
    assert line["citations"][0]["place"] == "fees.md, line 6" and len(line["version"]["digest"]) == 64
    down.click()
    expect(down).to_have_attribute("aria-pressed", "true")
    expect(up).to_have_attribute("aria-pressed", "false")
    assert len(read_feedback(feedback)) == before + 1 and read_feedback(feedback)[-1]["vote"] == "down"
    down.click()
    expect(page.locator("#note")).to_have_text("Taken back.")
    assert len(read_feedback(feedback)) == before
    expect(page.locator("footer")).to_contain_text("serving-feedback")


def test_a_thumb_that_cannot_be_kept_is_not_shown_as_kept(chromium, home):
    with opened(chromium, home, fails=True) as page:
        turn = ask(page, "What does an overdraft cost?")
        page.route("**/feedback", lambda route: route.abort())
        up = turn.get_by_role("button", name="Good answer")
        up.click()
        expect(page.locator("#note")).to_have_text("Not kept: the server does not answer")
        expect(up).to_have_attribute("aria-pressed", "false")
        page.unroute("**/feedback")
        up.click()
        expect(up).to_have_attribute("aria-pressed", "true")


def test_keys(page):
    box = page.locator("#question")
    expect(box).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert box.input_value() == "one\ntwo" and page.locator("#talk > li").count() == 0
    composing = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    page.evaluate(f"document.getElementById('question').dispatchEvent({composing})")  # a syllable is not finished
    assert page.locator("#talk > li").count() == 0
    box.fill("a slow overdraft")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#talk > li").last).to_contain_text("Stopped.")
    expect(page.locator("#send")).to_be_visible()
    turn = ask(page, "What does an overdraft cost?")
    expect(turn.locator(".answer")).to_have_text("12.50 euro")
    page.keyboard.press("Shift+Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"


def test_the_model_alone_streams_and_says_where_it_was_ended(page):
    page.locator("#model").select_option("assistant-4bit")
    turn = ask(page, "Hello?")
    expect(turn.locator(".answer")).not_to_be_empty()
    expect(turn).to_contain_text("Ended")
    expect(turn.locator("details")).to_have_count(0)
    ask(page, "And then?")
    assert page.locator("#talk > li").count() == 2


@pytest.mark.parametrize(
    "locale, says", [("en-US", "oldest turns left out: 1."), ("ko-KR", "대화가 길어 읽지 않은 가장 오래된 문답 수: 1.")]
)
def test_a_conversation_that_is_too_long_says_what_was_left_out(chromium, home, locale, says):
    from llmops.foundation.models import load_tokenizer

    a_word = len(load_tokenizer(model_path("tiny:llama"))(" harbour")["input_ids"])
    question = "harbour " * (600 // a_word)  # two of them do not fit into 1024 tokens
    with opened(chromium, home, locale=locale) as page:
        page.locator("#model").select_option("assistant-4bit")
        expect(ask(page, question)).not_to_contain_text(says)
        expect(ask(page, question)).to_contain_text(says)


def test_every_control_has_a_name(page):
    ask(page, "What does an overdraft cost?")
    named = "n => (n.getAttribute('aria-label') || n.closest('label')?.textContent || n.textContent).trim()"
    for control in page.locator("button, select, textarea, summary").all():
        assert control.evaluate(named), control.evaluate("n => n.outerHTML")
    assert page.locator("#log").get_attribute("aria-live") == "polite"
    assert page.locator("html").get_attribute("lang") == "en"
    small = "[...document.querySelectorAll('button')].filter(n => n.offsetParent && n.getBoundingClientRect().height < 44).length"
    assert page.evaluate(small) == 0


def test_korean_on_a_dark_phone(chromium, home):
    phone = {"width": 360, "height": 740}
    with opened(chromium, home, locale="ko-KR", viewport=phone, color_scheme="dark", has_touch=True) as page:
        assert page.locator("html").get_attribute("lang") == "ko"
        expect(page.locator("h1")).to_have_text("물어보기")
        expect(page.locator("#send")).to_have_text("묻기")
        turn = ask(page, "며칠 안에 환불할 수 있나요?")
        expect(turn.locator(".answer")).to_have_text("7일")
        turn.locator("summary").first.click()
        expect(turn.locator(".passage mark").first).to_have_text("7일")
        assert page.evaluate("getComputedStyle(document.body).wordBreak") == "keep-all"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(json.loads(back.replace("rgb(", "[").replace(")", "]"))) < 60
        keep_picture(page, "ask-korean-phone")


def test_a_narrow_page_does_not_scroll_sideways(chromium, home):
    with opened(chromium, home, viewport={"width": 320, "height": 600}) as page:
        ask(page, "overdraft " + "x" * 300)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_server_that_is_gone_is_said(chromium, home):
    with opened(chromium, home, fails=True) as page:
        page.route("**/v1/chat/completions", lambda route: route.abort())
        expect(ask(page, "What does it cost?")).to_contain_text("No answer: the server does not answer")
