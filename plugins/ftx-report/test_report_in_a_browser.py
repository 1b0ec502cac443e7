"""The page in a real headless Chromium: drawn, light and dark, on a phone, browsed through 10,000 items, and deaf to hostile text."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from ftx_report_read import tell, tell_all
from ftx_report_run import compare_page, run_page

sys.path.insert(0, str(Path(__file__).parent))
from browser import chromium, look, photograph
from synthetic_runs import HOSTILE, PLAN, exact_match_run, judged_run, preference_run, write_run

MANY = 10_000


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile") / "new") as started:
        yield started


@pytest.fixture
def visit(driver, tmp_path):
    """Write a page, open it on a screen, and fail if the browser complains of it."""

    def opened(html: str, **screen):
        file = tmp_path / "page.html"
        file.write_text(html, "utf-8")
        look(driver, **screen)
        driver.get(file.as_uri())
        return driver

    yield opened
    assert [entry["message"] for entry in driver.get_log("browser")] == []


def run(driver, script: str, *arguments):
    return driver.execute_script(script, *arguments)


def until(driver, script: str, expected, seconds: float = 10.0) -> None:
    """Wait for what a script gives: the page draws when the browser finds time."""
    end = time.monotonic() + seconds
    while (found := run(driver, script)) != expected:
        assert time.monotonic() < end, f"{found!r}, not {expected!r}"
        time.sleep(0.05)


ROWS = "return document.querySelectorAll('.row').length"
COUNT = "return document.getElementById('count').textContent"
DETAIL = "return document.getElementById('detail').textContent"


def search(driver, words: str) -> None:
    run(driver, "const s = document.getElementById('search'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", words)


def press(driver, name: str) -> None:
    run(driver, "document.querySelector(`#filters [data-filter='${arguments[0]}']`).click()", name)


# ---- what is shown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("screen", [{}, {"dark": True}, {"width": 390, "height": 844}], ids=["light", "dark", "phone"])
@pytest.mark.parametrize("kind", ["run", "preferences", "judged", "compared"])
def test_a_page_is_drawn_and_fits(visit, tmp_path, kind, screen):
    made = {
        "run": lambda: run_page(tell(exact_match_run(tmp_path / "a", plan=PLAN))),
        "preferences": lambda: run_page(tell(preference_run(tmp_path / "a"))),
        "judged": lambda: run_page(tell(judged_run(tmp_path / "a"))),
        "compared": lambda: compare_page(tell_all([exact_match_run(tmp_path / "a"), exact_match_run(tmp_path / "b")])),
    }
    driver = visit(made[kind](), **screen)
    wide, screen_width = run(driver, "return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= screen_width == screen.get("width", 1280), "the page scrolls sideways"
    back, ink = run(driver, "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    assert (brightness(back) < 60 < brightness(ink)) if screen.get("dark") else (brightness(ink) < 60 < brightness(back))
    for box in run(
        driver, "return [...document.querySelectorAll('svg')].map((svg) => [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height])"
    ):
        assert min(box) > 30
    assert run(driver, ROWS) > 0 and run(driver, DETAIL)
    photograph(driver, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def brightness(colour: str) -> float:
    return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3


# ---- the items -----------------------------------------------------------------------------------------------------


def test_ten_thousand_items_are_browsed_and_only_those_in_sight_are_drawn(visit, tmp_path):
    driver = visit(run_page(tell(exact_match_run(tmp_path / "run", MANY))))
    assert run(driver, COUNT) == "10000 of 10000" and run(driver, ROWS) < 40
    assert run(driver, "return document.getElementsByTagName('*').length") < 1000
    run(driver, "document.getElementById('list').scrollTop = 1e9")
    until(driver, "return [...document.querySelectorAll('.row')].pop().id", "item-9999")
    assert run(driver, ROWS) < 40

    search(driver, "OFFER 7777:")
    until(driver, COUNT, "1 of 10000")
    assert "Offer 7777: name and price" in run(driver, DETAIL) and run(driver, "return document.querySelector('#detail mark').textContent") == "Offer 7777:"
    search(driver, "9999 euros")
    until(driver, COUNT, "1 of 10000")
    search(driver, "nothing says this")
    until(driver, COUNT, "0 of 10000")
    assert run(driver, DETAIL) == "No item fits."
    started = time.monotonic()
    search(driver, "euros")
    until(driver, COUNT, "9001 of 10000")
    assert time.monotonic() - started < 5


def test_filters(visit, tmp_path):
    driver = visit(run_page(tell(exact_match_run(tmp_path / "run"))))
    labels = "return [...document.querySelectorAll('#filters button')].map((button) => button.textContent)"
    assert run(driver, labels) == ["all 100", "fixed 85", "broken 1", "unchanged 14", "still wrong 5"]
    press(driver, "broken")
    assert run(driver, COUNT) == "1 of 100" and run(driver, ROWS) == 1
    detail = run(driver, DETAIL)
    for text in ("Item 6 of 100 · broken", "prompt: user", "Offer 5: name and price", "base: correct", "tuned: wrong", "reference", '"price": 5.99', "f1"):
        assert text in detail, text
    press(driver, "unchanged")
    assert run(driver, COUNT) == "14 of 100"
    search(driver, "offer 1")
    until(driver, COUNT, "1 of 100")
    assert run(driver, labels)[0] == "all 11"


def test_keys_move_through_the_items(visit, tmp_path):
    from selenium.webdriver.common.keys import Keys

    driver = visit(run_page(tell(exact_match_run(tmp_path / "run"))))
    items = driver.find_element("id", "list")
    items.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert "Item 3 of 100" in run(driver, DETAIL) and items.get_attribute("aria-activedescendant") == "item-2"
    items.send_keys(Keys.END)
    assert "Item 100 of 100" in run(driver, DETAIL)
    until(driver, "return !!document.getElementById('item-99')", True)


def test_evaluators_and_categories_are_chosen(visit, tmp_path):
    driver = visit(run_page(tell(judged_run(tmp_path / "run"))))
    change = "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))"
    run(driver, change, "category", "math")
    assert run(driver, COUNT) == "2 of 8"
    assert "gpt-4 on tuned: 5" in run(driver, DETAIL) and "The answer is tuned." in run(driver, DETAIL)
    run(driver, change, "set", "1")
    assert run(driver, COUNT) == "1 of 1" and "qwen3 on the pair: win" in run(driver, DETAIL)
    assert run(driver, "return document.getElementById('category').hidden")


def test_values_under_the_pointer(visit, tmp_path):
    driver = visit(run_page(tell(write_run(tmp_path / "run"))))
    point = """
      const svg = document.querySelector('#training svg'), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width, clientY: box.top + 20}));
      return svg.parentElement.querySelector('.at').textContent"""
    assert run(driver, point) == "step 40: loss 0.04899, evaluation 0.06292"


def test_the_recipe_is_copied(visit, tmp_path):
    made = write_run(tmp_path / "run")
    driver = visit(run_page(tell(made)))
    driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    button = driver.find_element("css selector", "button[data-copy='recipe-2']")
    button.click()
    until(driver, "return document.querySelector(\"button[data-copy='recipe-2']\").textContent", "copied")
    assert driver.execute_async_script("navigator.clipboard.readText().then(arguments[0], (error) => arguments[0](String(error)))") == made.recipe.read_text()


def test_without_scripts_the_page_still_tells(driver, visit, tmp_path):
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        visit(run_page(tell(exact_match_run(tmp_path / "run"))))
        assert "The items need a script" in driver.find_element("tag name", "body").text
        assert "Training raised exact_match" in driver.find_element("id", "verdict").text
        assert len(driver.find_elements("css selector", "#training polyline")) == 5
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


# ---- text from outside ---------------------------------------------------------------------------------------------


def test_hostile_text_is_shown_and_runs_nothing(visit, tmp_path):
    made = exact_match_run(tmp_path / "run", 3, recipe={"model": HOSTILE, "evaluators": []}, ledger=[{"action": "dropped", "reason": HOSTILE, "file": HOSTILE}])
    for phase in ("base", "tuned"):
        item = {
            "prompt": HOSTILE,
            "answer": f"{phase}: {HOSTILE}",
            "reference": HOSTILE,
            "verdict": HOSTILE,
            "judges": [{"judge": HOSTILE, "reasoning": HOSTILE}],
        }
        made.write_items("exact-match", phase, [item, {**item, "category": HOSTILE}, item])
    driver = visit(run_page(tell(made), title=HOSTILE))
    assert run(driver, "return document.title").split() == HOSTILE.replace("\x00", "\N{REPLACEMENT CHARACTER}").split(), "HTML has no NUL"
    assert run(driver, "return document.querySelector('#detail .answers .text').textContent") == f"base: {HOSTILE}"
    search(driver, "onerror=")
    until(driver, "return document.querySelector('#detail mark')?.textContent", "onerror=")
    assert run(driver, "return [...document.querySelectorAll('#detail .text')].every((text) => text.children.length === text.querySelectorAll('mark').length)")
    assert run(driver, "return [window.ran, document.images.length, document.scripts.length]") == [None, 0, 2]


def test_the_policy_stops_what_would_get_past_the_escaping(driver, visit, tmp_path):
    """Were there a hole, the browser itself would refuse to run what came through it."""
    html = run_page(tell(write_run(tmp_path / "run"))).replace("<h1>", "<script>window.ran = true</script><img src=x onerror='window.ran = true'><h1>", 1)
    visit(html)
    assert run(driver, "return window.ran") is None
    assert len(driver.get_log("browser")) >= 2, "it says what it refused"
