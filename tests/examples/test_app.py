"""examples/app.py: the actions behind the page, then the page itself in a real browser (slow)."""

import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.adapters import adapter_set
from support.adapters import adapters as adapters  # a fixture
from support.browser import CHROMIUM, Browser
from support.examples import EXAMPLES, load_example

from colora_peft.images.reading import to_pil

gr = pytest.importorskip("gradio", reason="the extra demo is not installed")
app = load_example("app")


@pytest.fixture(scope="module")
def restorer(tiny_nafnet, adapters):
    return app.PhotoRestorer(adapter_set(tiny_nafnet, adapters), max_pixels=10_000)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "holiday.png"
    to_pil(torch.rand(3, 24, 40, generator=torch.Generator().manual_seed(0))).save(path)
    return str(path)


# --------------------------------------------------------------------------------------------------------- actions


def test_a_photo_becomes_two_images_a_line_and_a_file(restorer, photo):
    (before, after), line, download = app.restore(restorer, photo, "haze", 1.0)
    assert not np.array_equal(np.asarray(Image.open(before)), np.asarray(Image.open(after)))
    assert re.fullmatch(r"40 × 24 pixels, \d+\.\d s", line)
    assert Path(download.value["path"]).name == "holiday-haze.png" and download.interactive


def test_no_photo_is_no_error(restorer):
    images, line, download = app.restore(restorer, None, "haze", 1.0)
    assert images is None and line == "" and not download.interactive


def test_what_is_no_image_becomes_a_message(restorer, tmp_path):
    (tmp_path / "<b>.txt").write_text("no image")
    with pytest.raises(gr.Error, match="&lt;b&gt;.txt cannot be read as an image") as caught:
        app.restore(restorer, str(tmp_path / "<b>.txt"), "haze", 1.0)
    assert not caught.value.print_exception


def test_other_adapters_are_folders_only_where_that_is_allowed(restorer, adapters):
    folder = str(adapters["rain"])
    with pytest.raises(gr.Error, match="ids on the Hub alone"):
        app.add_adapter(restorer, False, folder)
    radio, box = app.add_adapter(restorer, True, folder)
    assert radio.value == folder and (folder, folder) in radio.choices and box.value == ""
    with pytest.raises(gr.Error, match="Type the id"):
        app.add_adapter(restorer, True, " ")


@pytest.mark.parametrize(
    ("name", "variable", "public"),
    [(None, None, False), ("localhost", None, False), ("0.0.0.0", None, True), (None, "0.0.0.0", True)],
)
def test_a_page_that_others_reach_is_public(monkeypatch, name, variable, public):
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    if variable is not None:
        monkeypatch.setenv("GRADIO_SERVER_NAME", variable)
    assert app.PageArguments(server_name=name).is_public is public


def test_limits_below_one_are_refused():
    with pytest.raises(ValueError, match="--max_megapixels must be at least 1"):
        app.PageArguments(max_megapixels=0)


def test_the_page_asks_no_other_host_and_sends_nothing(restorer):
    page = app.build_page(restorer, [], folders_allowed=False)
    assert page.analytics_enabled is False
    theme = app.theme()
    assert not theme._stylesheets and "googleapis" not in theme._get_theme_css()


# --------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Address of the page as it is shipped."""
    page = app.serve(app.PageArguments(max_megapixels=1))
    yield page.local_url
    page.close()


@pytest.fixture
def browser(address):
    with Browser(seconds=120) as browser:
        browser.open(address)
        browser.wait_for("document.querySelectorAll('#examples img').length == 4")
        yield browser


SHOWN = "[...document.querySelectorAll('#result img')].map(image => image.src)"


def click_example(browser, number):
    browser.evaluate(f"document.querySelectorAll('#examples button')[{number}].click()")
    browser.wait_for("/pixels/.test(document.querySelector('#line')?.innerText ?? '')")
    return browser.wait_for(f"{SHOWN}.length == 2 && {SHOWN}")


def fetch_image(url, path):
    path.write_bytes(urllib.request.urlopen(url).read())
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


slow_with_chromium = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


class TestInChromium:
    pytestmark = slow_with_chromium

    def test_an_example_is_restored_and_nothing_is_asked_of_other_hosts(self, browser, address, tmp_path):
        before, after = (fetch_image(url, tmp_path / "shown.jpg") for url in click_example(browser, 0))
        target = Image.open(EXAMPLES / "data/underwater/test/target/76.jpg").convert("RGB")
        errors = [np.abs(image - np.asarray(target)).mean() for image in (before, after)]
        assert before.shape == after.shape == (405, 720, 3) and errors[1] < 0.6 * errors[0]
        (tmp_path / "downloads").mkdir()
        result = browser.download("document.querySelector('#download').click()", tmp_path / "downloads")
        assert result.name == "76-underwater.jpg"
        assert np.abs(np.asarray(Image.open(result)) - after).mean() < 2  # as two JPEGs
        foreign = [url for url in browser.requested if not url.startswith((address, "data:", "blob:"))]
        assert foreign == []

    def test_another_adapter_and_strength_0_show_other_images(self, browser, tmp_path):
        first = click_example(browser, 3)
        browser.evaluate("document.querySelector('#adapter input[value=none]').click()")
        second = browser.wait_for(f"{SHOWN}.length == 2 && {SHOWN}[1] != '{first[1]}' && {SHOWN}")
        images = [fetch_image(shown[1], tmp_path / "shown.jpg") for shown in (first, second)]
        assert np.abs(images[0] - images[1]).mean() > 2

    def test_what_is_no_image_is_refused_politely(self, browser, tmp_path):
        for name in ("note.txt", "fake.png"):
            (tmp_path / name).write_text("no image")
            browser.choose_file("#photo input[type=file]", tmp_path / name)
            said = browser.wait_for(f"[...document.querySelectorAll('.toast-wrap')].map(one => one.innerText).find("
                                    f"text => text.includes('{name}'))")  # fmt: skip
            assert "Traceback" not in said and str(tmp_path) not in said
        assert browser.evaluate(SHOWN) == []

    def test_too_many_pixels_are_refused_politely(self, browser, tmp_path):
        Image.new("RGB", (1200, 900)).save(tmp_path / "large.png")
        browser.choose_file("#photo input[type=file]", tmp_path / "large.png")
        browser.wait_for("document.body.innerText.includes('large.png has 1.1 million pixels')")

    def test_the_page_fits_a_phone(self, browser):
        browser.resize(390, 844)
        assert browser.wait_for("document.documentElement.scrollWidth") <= 390
