"""The inspection page, in a real browser: what it shows, how it answers, and that it asks nothing of anyone."""

import json
import re
import shutil
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from qtale_lightning.report.page import palette, render_page

pytestmark = pytest.mark.slow

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1300,900"),
)
in_a_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="needs chromium and chromedriver: apt-get install chromium chromium-driver",
)
NASTY = "</script><img src=x onerror='document.title=1'>"


def make_trace(executed: list[str]) -> dict[str, Any]:
    """p(execute) is 0.9 where a layer is executed and 0.1 where it isn't, and a little more in each token."""
    probability = [[900 + t if c == "1" else 100 + t for c in row] for t, row in enumerate(executed)]
    return {"executed": executed, "probability": probability, "nll": [None, *(1.5 for _ in executed[1:])]}


def make_document() -> dict[str, Any]:
    """Five layers, one without a router; two reserved tokens; in 4 bits one token decides otherwise in two layers."""
    first = ["1111", "1111", "0000", "1100", "1111"]
    changed = ["1111", "1111", "0000", "1010", "1111"]
    measured = {
        "theta": 0.5, "examples": 200, "tokens": 4921, "execution_ratio": 0.7, "decisions_changed": 0.03,
        "paths_changed": 0.485, "flip_ratio": 0.19, "paths": {"tokens": 4921, "distinct": 2770, "entropy": 7.4},
        "nll": 3.8, "nll_same_decisions": 3.8, "nll_difference_stderr": 0.0,
    }  # fmt: skip
    quantized = measured | {"bits": 4, "engine": "native", "nll": 3.95, "nll_same_decisions": 3.9}
    return {
        "schema": 1,
        "title": f"tiny · qtale · {NASTY}",
        "theta": 0.5,
        "layers": 5,
        "start_layer": 1,
        "reserved_tokens": 2,
        "shares": [1.0],
        "precisions": [{"bits": 16, "engine": "none"} | measured, quantized],
        "texts": [
            {
                "name": "piqa",
                "tokens": ["Question", ":", "\n", " hammer", " nails"],
                "answer": 4,
                "traces": [make_trace(first), make_trace(changed)],
            },
            {
                "name": NASTY,
                "tokens": ["A", ":", NASTY, "", "é"],
                "answer": 5,
                "traces": [make_trace(first), make_trace(first)],
            },
        ],
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    assert BROWSER is not None
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def requests(browser: webdriver.Chrome) -> list[str]:
    """What the browser asked for since the last call, of files or of a network."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@pytest.fixture
def page(browser: webdriver.Chrome, tmp_path: Path) -> webdriver.Chrome:
    """The page of `make_document`, opened from a file."""
    path = tmp_path / "page.html"
    path.write_text(render_page(make_document()), encoding="utf-8")
    for log in ("performance", "browser"):
        browser.get_log(log)
    browser.get(path.as_uri())
    return browser


def token(page: webdriver.Chrome, text: int, precision: int, place: int) -> Any:
    selector = f'[data-text="{text}"][data-precision="{precision}"][data-token="{place}"]'
    return page.find_element(By.CSS_SELECTOR, selector)


def strips(page: webdriver.Chrome) -> list[list[str]]:
    """The titles of the layers, in each strip of the token that is shown."""
    drawn = page.find_elements(By.CSS_SELECTOR, "#detail .strip")
    return [
        [title.get_attribute("textContent") for title in strip.find_elements(By.TAG_NAME, "title")]
        for strip in drawn
    ]


def luminance(colour: str) -> float:
    """WCAG's, of a CSS colour in any of the notations used here."""
    if colour.startswith("#"):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    else:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


# -------------------------------------------------------------------------------------------------- in the browser


@in_a_browser
def test_tokens_are_shown_and_darker_the_more_layers_they_execute(page: webdriver.Chrome) -> None:
    for at, text in enumerate(make_document()["texts"]):
        for precision in (0, 1):
            selector = f'[data-text="{at}"][data-precision="{precision}"]'
            found = page.find_elements(By.CSS_SELECTOR, selector)
            assert [one.get_attribute("textContent") for one in found] == text["tokens"]
            assert all(one.is_displayed() for one in found if one.text.strip())
    skipping, half, full = (token(page, 0, 0, place) for place in (2, 3, 4))
    backgrounds = [luminance(one.value_of_css_property("background-color")) for one in (skipping, half, full)]
    assert backgrounds == sorted(backgrounds, reverse=True)
    assert len(set(backgrounds)) == 3
    for one, back in zip((skipping, half, full), backgrounds, strict=True):
        ink = luminance(one.value_of_css_property("color"))
        contrast = (max(ink, back) + 0.05) / (min(ink, back) + 0.05)
        assert contrast >= 4.5  # WCAG's level AA
    assert re.sub(r"\s", "", page.find_element(By.ID, "legend").text) == "15layers"
    assert "answer" in full.get_attribute("class")
    assert "reserved" in token(page, 0, 0, 1).get_attribute("class")


@in_a_browser
def test_hovering_shows_the_layers_of_a_token_at_each_precision(page: webdriver.Chrome) -> None:
    assert strips(page) == []
    ActionChains(page).move_to_element(token(page, 0, 1, 3)).perform()
    first, second = strips(page)
    assert first == [
        "layer 0: no router, always executed",
        "layer 1: p(execute) = 0.903, executed",
        "layer 2: p(execute) = 0.903, executed",
        "layer 3: p(execute) = 0.103, skipped",
        "layer 4: p(execute) = 0.103, skipped",
    ]
    assert second[2] == "layer 2: p(execute) = 0.103, skipped, unlike 16 bits"
    assert second[3] == "layer 3: p(execute) = 0.903, executed, unlike 16 bits"
    detail = page.find_element(By.ID, "detail")
    assert detail.is_displayed()
    assert '" hammer" token 3 of text 1' in detail.text
    assert "4 bits · 3 of 5 layers · nll 1.50 · changed: 2, 3" in detail.text
    marks = detail.find_elements(By.CSS_SELECTOR, ".layer:has(.mark)")
    assert [mark.get_attribute("data-layer") for mark in marks] == ["2", "3"]
    ActionChains(page).move_to_element(token(page, 0, 0, 1)).perform()
    assert strips(page)[0][1] == "layer 1: reserved token, always executed"


@in_a_browser
def test_sublayers_are_shown_and_counted_by_their_weights(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Three layers, the last two with a router each of attention, a quarter of a layer, and of the MLP."""
    path = tmp_path / "page.html"
    path.write_text(render_page(make_document() | {"layers": 3, "shares": [0.25, 0.75]}), encoding="utf-8")
    browser.get(path.as_uri())
    ActionChains(browser).move_to_element(token(browser, 0, 1, 3)).perform()
    first, second = strips(browser)
    assert first[2:] == [
        "layer 1's attention: p(execute) = 0.903, executed",
        "layer 1's MLP: p(execute) = 0.903, executed",
        "layer 2's attention: p(execute) = 0.103, skipped",
        "layer 2's MLP: p(execute) = 0.103, skipped",
    ]
    assert second[3] == "layer 1's MLP: p(execute) = 0.103, skipped, unlike 16 bits"
    text = browser.find_element(By.ID, "detail").text
    assert "16 bits · 2.0 of 3 layers" in text
    assert "4 bits · 1.5 of 3 layers · nll 1.50 · changed: layer 1's MLP, layer 2's attention" in text


@in_a_browser
def test_the_keyboard_reaches_every_token(page: webdriver.Chrome) -> None:
    """Tab stops once in each text; the arrows step through it."""
    page.find_element(By.CSS_SELECTOR, "input[value=executed]").send_keys(Keys.TAB)
    where = []
    for key in (Keys.ARROW_RIGHT, Keys.END, Keys.ARROW_LEFT, Keys.TAB, Keys.SHIFT + Keys.TAB):
        page.switch_to.active_element.send_keys(key)
        data = page.switch_to.active_element.get_property("dataset")
        where.append((int(data["text"]), int(data["precision"]), int(data["token"])))
    assert where == [(0, 0, 1), (0, 0, 4), (0, 0, 3), (0, 1, 0), (0, 0, 3)]
    assert strips(page)[0][1] == "layer 1: p(execute) = 0.903, executed"


@in_a_browser
def test_tokens_can_be_coloured_by_changed_decisions(page: webdriver.Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, "input[value=changed]").click()
    white = "rgba(255, 255, 255, 1)"
    assert token(page, 0, 1, 4).value_of_css_property("background-color") == white
    assert token(page, 0, 1, 3).value_of_css_property("background-color") != white
    assert token(page, 0, 0, 3).value_of_css_property("background-color") == white


@in_a_browser
def test_the_summary_says_what_was_measured(page: webdriver.Chrome) -> None:
    rows = [row.text for row in page.find_elements(By.CSS_SELECTOR, "#summary tbody tr")]
    assert rows[1] == "4 bits 70.0 % 3.0 % 48.5 % 19.0 % 2,770 7.40 3.950 3.900"
    (cost,) = page.find_elements(By.CSS_SELECTOR, "#costs li")
    assert "changes by +0.150 nats; by +0.100" in cost.text
    bars = page.find_elements(By.CSS_SELECTOR, "#layers .strip:last-child title")
    assert bars[2].get_attribute("textContent") == (
        "layer 2: 50.0 % of the tokens execute it, 16.7 % decide otherwise than at 16 bits"
    )


@in_a_browser
def test_text_is_never_read_as_html(page: webdriver.Chrome) -> None:
    assert page.find_elements(By.TAG_NAME, "img") == []
    assert token(page, 1, 0, 2).text == NASTY
    ActionChains(page).move_to_element(token(page, 1, 0, 2)).perform()
    assert json.dumps(NASTY) in page.find_element(By.ID, "detail").text
    assert page.find_elements(By.TAG_NAME, "img") == []
    assert page.title == f"tiny · qtale · {NASTY}: layers of each token"
    assert [entry["message"] for entry in page.get_log("browser")] == []


@in_a_browser
def test_no_request_leaves_the_page(page: webdriver.Chrome) -> None:
    ActionChains(page).move_to_element(token(page, 0, 1, 3)).perform()
    page.find_element(By.CSS_SELECTOR, "input[value=changed]").click()
    assert set(requests(page)) == {page.current_url}


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("guarded", [True, False])
def test_the_pages_policy_holds_a_request_back(
    browser: webdriver.Chrome, tmp_path: Path, guarded: bool
) -> None:
    """As if a text had become HTML after all; without the policy the image is asked for, and the log shows it."""
    page = render_page(make_document())
    path = tmp_path / "page.html"
    path.write_text(page if guarded else re.sub("<meta http-equiv.*>", "", page), encoding="utf-8")
    browser.get(path.as_uri())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        add = "const i = document.createElement('img'); i.src = arguments[0]; document.body.append(i)"
        url = f"http://127.0.0.1:{server.getsockname()[1]}/out.png"
        browser.execute_script(add, url)
        if guarded:
            with pytest.raises(TimeoutError):
                server.accept()
        else:
            server.accept()[0].close()
            assert url in requests(browser)


# ----------------------------------------------------------------------------------------------- without a browser


def test_the_data_in_the_page_is_the_document() -> None:
    page = render_page(make_document())
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    content = json.loads(data)
    assert content.pop("palette") == palette()
    assert content == make_document()
    assert page.count("</script>") == 2
    # The one address in it is the name of a namespace.
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}


def test_colours_fall_in_lightness_by_nearly_equal_steps() -> None:
    """CIE L*, from what colour-blind readers see and a grey print keeps."""
    lightness = np.array([116 * np.cbrt(luminance(colour)) - 16 for colour in palette()])
    steps = -np.diff(lightness)
    assert steps.min() > 0
    assert steps.max() < 2 * steps.min()
    assert lightness[0] - lightness[-1] > 40


def test_a_large_page_stays_small() -> None:
    """30 texts of 60 tokens, 30 layers and 3 precisions: what a run of SmolLM2 shows."""
    generator = np.random.default_rng(0)

    def random_trace() -> dict[str, Any]:
        probability = generator.integers(0, 1001, (60, 28))
        executed = ["".join("01"[int(p > 500)] for p in row) for row in probability]
        return {"executed": executed, "probability": probability.tolist(), "nll": [None, *([1.234] * 59)]}

    text = {"name": "piqa", "tokens": [" token"] * 60, "answer": 50}
    content = make_document() | {"layers": 30, "start_layer": 2}
    content["precisions"] = [{"bits": bits, "engine": "native"} for bits in (16, 4, 3)]
    content["texts"] = [text | {"traces": [random_trace() for _ in range(3)]} for _ in range(30)]
    assert len(render_page(content).encode()) < 1_000_000


def test_the_install_brings_the_template() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["qtale_lightning"]
    package = root / "qtale_lightning"
    brought = {file for pattern in patterns for file in package.glob(pattern)}
    assert {package / "report/template" / f"page.{kind}" for kind in ("html", "css", "js")} <= brought
