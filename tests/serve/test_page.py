"""The chat page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.browser import CHROMIUM, Browser
from tests.serve.conftest import Server, Start

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.close()


def ask(browser: Browser, question: str) -> None:
    browser.run("document.getElementById('question').focus()")
    browser.write(question)
    browser.press("Enter", 13, "\r")


def answered(browser: Browser) -> None:
    browser.until("document.querySelector('.again') !== null && !running")


def test_a_question_is_answered_and_the_chip_is_named(browser: Browser, server: Server) -> None:
    browser.open(server.url)
    browser.until("about !== null")
    assert (
        browser.run("document.getElementById('chipname').textContent") == "main, fit for inference"
    )
    ask(browser, "1+2=?")
    answered(browser)
    assert browser.run("document.querySelector('.turn.user').textContent") == "1+2=?"
    assert browser.run("turns.length === 2 && (turns[1].content + turns[1].thought).length > 0")
    browser.run("document.getElementById('chip').click()")
    browser.until("document.getElementById('facts').textContent.includes('main')")
    browser.press("Escape", 27)
    assert browser.messages == []


def test_regenerate_replaces_the_answer_and_stop_keeps_what_was_said(
    browser: Browser, server: Server
) -> None:
    browser.open(server.url)
    browser.until("about !== null")
    ask(browser, "2+2=?")
    answered(browser)
    browser.run("document.querySelector('.again').click()")
    answered(browser)
    assert browser.run("document.querySelectorAll('.turn').length") == 2
    # hold the answer back in the page, so that there is time to stop it
    browser.run(
        "window.real = fetch; window.fetch = (...a) => a[1] ? new Promise((_, no) => a[1].signal.onabort = () => no(new DOMException('', 'AbortError'))) : real(...a)"
    )
    ask(browser, "3+3=?")
    browser.until("document.getElementById('send').textContent === 'Stop'")
    browser.press("Escape", 27)
    browser.until("!running")
    assert "Stopped" in browser.run("document.getElementById('talk').textContent")


def test_the_time_of_a_thought_is_its_own_though_words_came_before_it(
    browser: Browser, server: Server
) -> None:
    browser.open(server.url)
    browser.until("about !== null")
    browser.run(TOLD)
    ask(browser, "5+5=?")
    answered(browser)
    number, unit = browser.run("document.querySelector('.thought summary').textContent").removeprefix("Thought for ").split()  # fmt: skip
    assert float(number) * {"ms": 1, "s": 1000}[unit] >= 390


TOLD = """window.real = fetch; window.fetch = (where, how) => !how || how.method !== "POST" ? real(where, how) : Promise.resolve(new Response(new ReadableStream({
  async start(stream) {
    const say = text => stream.enqueue(new TextEncoder().encode("data: " + text + "\\n\\n")), wait = ms => new Promise(done => setTimeout(done, ms));
    const delta = part => say(JSON.stringify({choices: [{index: 0, delta: part, finish_reason: null}]}));
    delta({content: "Well, "}); await wait(50); delta({reasoning: "ten"}); await wait(400); delta({content: "10"}); say("[DONE]"); stream.close();
  }})))"""


def test_markup_in_an_answer_stays_text(browser: Browser, server: Server) -> None:
    browser.open(server.url)
    browser.until("document.querySelector('.hello') !== null")
    evil = (
        '<img src=x onerror="window.broken=1"> **bold** [x](javascript:alert(1)) `<b>` [ok](https://a.example/)'
        "\n\n```\n<script>window.broken=1</script>\n```"
    )
    browser.run(f"document.getElementById('talk').replaceChildren(markdown({json.dumps(evil)}))")
    assert browser.run("document.querySelectorAll('main img, main script, main b').length") == 0
    assert browser.run("[...document.querySelectorAll('main a')].map(a => a.href)") == [
        "https://a.example/"
    ]
    assert browser.run("document.querySelector('main strong').textContent") == "bold"
    assert browser.run("document.querySelector('main pre').textContent").startswith("<script>")
    assert browser.run("window.broken") is None


def test_a_refusal_is_shown_in_words(browser: Browser, server: Server) -> None:
    browser.open(server.url)
    browser.until("about !== null")
    ask(browser, "1" * 300)
    browser.until("document.querySelector('.note') !== null")
    assert "context holds 128 tokens" in browser.run("document.querySelector('.note').textContent")


@pytest.mark.parametrize(
    ("width", "dark"), [(1100, False), (1100, True), (390, False), (320, True)]
)
def test_nothing_sticks_out_at_any_width_and_text_is_readable(
    browser: Browser, server: Server, width: int, dark: bool, tmp_path: Path
) -> None:
    browser.open(server.url, width=width, dark=dark)
    browser.until("about !== null")
    ask(browser, "7+7=?")
    answered(browser)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    contrast = browser.run(CONTRAST)
    assert min(contrast.values()) >= 4.5, contrast
    browser.picture(tmp_path / "page.png")


CONTRAST = """(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)|transparent/.test(c)) return c; } return "rgb(255,255,255)"; };
  const ratio = e => { const a = light(getComputedStyle(e).color), b = light(ground(e)); return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); };
  return Object.fromEntries(["h1", "#chipname", "#send", ".turn.user .said", ".foot .figures", ".again"].map(s => [s, ratio(document.querySelector(s))]));
})()"""


@pytest.mark.slow
def test_the_key_is_asked_for_and_used(browser: Browser, start: Start) -> None:
    server = start(api_key="k")
    browser.open(server.url)
    browser.until("about !== null")
    ask(browser, "1+1=?")
    browser.until("document.querySelector('.note') !== null")
    assert "API key" in browser.run("document.querySelector('.note').textContent")
    browser.run(
        "document.getElementById('key').value = 'k'; document.querySelector('.again').click()"
    )
    browser.until("document.querySelector('.figures') !== null")
