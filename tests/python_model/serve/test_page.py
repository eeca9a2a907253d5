"""The page at / in headless Chromium: chat with streaming beside search, and text that stays text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("selenium", reason="selenium drives the browser")

from python_model import GritLM  # noqa: E402
from python_model.rag.index import add_documents, open_index  # noqa: E402
from python_model.rag.modes import Document  # noqa: E402
from python_model.serve.service import Limits  # noqa: E402
from tests.python_model.serve.server import Server, serving, wait_until  # noqa: E402

pytestmark = pytest.mark.browser
SCRIPT = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,800", "--lang=en"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def server(served_model: GritLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from python_model.commands.serve import add_indexes

    folder = tmp_path_factory.mktemp("page") / "docs"
    documents = [
        Document("river", "A river flows through the city.", "Rivers"),
        Document("script", f"What is a script? {SCRIPT}", SCRIPT),
    ]
    add_documents(open_index(str(folder), served_model), served_model, documents)
    options: dict[str, Any] = {"slow": 0.02, "limits": Limits(reply_tokens=30)}
    with serving(served_model, prepare=lambda s: add_indexes(s, [str(folder)], [], ""), **options) as running:
        yield running


def at(browser: Any, name: str) -> Any:
    return browser.find_element("id", name)


def open_page(browser: Any, url: str) -> None:
    browser.get(url)
    wait_until(lambda: at(browser, "model").text not in ("", "connecting …"))


def problems(browser: Any) -> list[str]:
    """What the browser complains about: errors of scripts, and what the content security policy has stopped."""
    return [row["message"] for row in browser.get_log("browser") if row["level"] == "SEVERE"]


def test_a_chat_streams_and_its_second_turn_follows_the_first(browser: Any, server: Server) -> None:
    open_page(browser, server.url)
    assert at(browser, "model").text == "tiny"
    lengths: set[int] = set()
    for number, text in enumerate(("What is a river?", f"And this: {SCRIPT}")):
        at(browser, "message").send_keys(text)
        at(browser, "send").click()

        def turns() -> list[Any]:
            return browser.find_elements("css selector", ".turn")

        wait_until(lambda n=number: len(turns()) == 2 * n + 2)
        assert turns()[-2].text == text
        while browser.find_elements("css selector", ".writing"):
            lengths.add(len(turns()[-1].text))
        assert at(browser, "send").is_enabled() and turns()[-1].text
    assert len(lengths) > 3, "the reply came in one piece"
    assert browser.title == "grit" and not browser.find_elements("css selector", ".turn script, .turn img")
    assert problems(browser) == []


def test_a_reply_that_is_markup_is_shown_as_text(browser: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from python_model.generate.text import TextStream

    def push(stream: TextStream, token: int) -> bool:
        # whatever the model says, the reply is markup
        stream.tokens.append(token)
        stream.text = SCRIPT * len(stream.tokens)
        stream._show(len(stream.text))
        return len(stream.tokens) == 3

    monkeypatch.setattr(TextStream, "push", push)
    open_page(browser, server.url)
    at(browser, "message").send_keys("Say it.\n")
    wait_until(lambda: SCRIPT * 3 in browser.find_element("css selector", "#turns").text)
    at(browser, "question").send_keys("What is a script?\n")
    wait_until(lambda: SCRIPT * 3 in at(browser, "answer").text)
    assert browser.title == "grit"
    assert not browser.find_elements("css selector", "#turns script, #turns img, #answer script, #answer img")
    assert problems(browser) == []


def test_search_shows_sources_as_text_with_their_scores(browser: Any, server: Server) -> None:
    open_page(browser, server.url)
    at(browser, "question").send_keys("What is a script?\n")
    wait_until(lambda: len(browser.find_elements("css selector", "#sources li")) == 2)
    wait_until(lambda: "tokens read" in at(browser, "answer").text)
    texts = [row.text for row in browser.find_elements("css selector", "#sources li")]
    assert any(SCRIPT in text for text in texts) and any("A river flows" in text for text in texts)
    scores = [float(row.text) for row in browser.find_elements("css selector", "#sources .score")]
    assert scores == sorted(scores, reverse=True)
    assert browser.title == "grit" and not browser.find_elements("css selector", "#sources script, #sources img")
    assert problems(browser) == []


def test_stop_ends_a_reply_and_frees_its_memory(browser: Any, server: Server) -> None:
    open_page(browser, server.url)
    at(browser, "message").send_keys("What is a city?\n")
    wait_until(lambda: len(server.engine.scheduler.running) == 1)
    at(browser, "stop").click()
    wait_until(lambda: not server.engine.scheduler.running)
    wait_until(lambda: not at(browser, "stop").is_displayed())


def test_the_page_asks_for_a_key_where_one_is_needed(browser: Any, served_model: GritLM) -> None:
    with serving(served_model, api_keys=["secret"]) as running:
        open_page(browser, running.url)
        wait_until(at(browser, "key").is_displayed)
        at(browser, "key-value").send_keys("secret\n")
        wait_until(lambda: at(browser, "model").text == "tiny")
        assert not at(browser, "key").is_displayed() and not at(browser, "question").is_enabled()


def test_the_page_loads_nothing_from_elsewhere(browser: Any, server: Server) -> None:
    open_page(browser, server.url)
    names = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names and all(name.startswith((server.url, "data:")) for name in names)
    folder = Path(__file__).parents[3] / "python_model" / "serve" / "page"
    if folder.is_dir():
        assert not any("http" in file.read_text() for file in folder.iterdir())
