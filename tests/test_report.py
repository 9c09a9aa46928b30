import base64
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from bert_finetune.errors import InputError
from experiments.report import Picture, data_uri, report_page
from experiments.tables_out import Number, ResultTable

# 1 x 1, one grey pixel.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="10"><rect width="9" height="9"/></svg>'
NASTY = """<script>alert("x")</script> & 'quoted' {braces}"""

MEASURED = ResultTable(
    "RTE, dev set",
    ["method", "mean", *(f"column {k}" for k in range(30))],
    [
        [name, value if value == "" else Number(f"{value:.1f}", value), *["0.1234 ± 0.0001"] * 30]
        for name, value in (("emd 10", 9.5), ("emd 9", 10.0), ("none", ""), ("skip", -3.0), ("uniform", 100.0))
    ],
)


@pytest.fixture
def pictures(tmp_path) -> list[Picture]:
    (tmp_path / "flow.png").write_bytes(PNG)
    (tmp_path / "curve.SVG").write_text(SVG)
    return [Picture(tmp_path / "flow.png", f"Flow {NASTY}"), Picture(tmp_path / "curve.SVG", "A curve")]


def page(pictures=(), notes=("1 run is left out.",)) -> str:
    published = ResultTable(
        "Published figures: test server", ["model", NASTY], [[NASTY, Number("82.1", 82.1)]], (NASTY,)
    )
    versions = ResultTable("Versions", ["package", "version"], [["torch", "2.13.0"]])
    return report_page(
        f"Results {NASTY}",
        [*notes, NASTY],
        [MEASURED],
        [published],
        list(pictures),
        {NASTY: f"python run.py {NASTY}"},
        versions,
        {"model/ablations": f'baseline = "none"  # {NASTY}'},
    )


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_nothing_comes_from_elsewhere(pictures):
    found = Elements(page(pictures)).found
    for tag, attributes in found:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
        assert tag not in ("link", "iframe", "object") and not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for t, a in found if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not re.search(r"@import|url\(", page(pictures))


def test_everything_is_escaped(pictures):
    text = page(pictures)
    assert text.count("<script>") == 1 and "alert(&quot;x&quot;)" in text and "{braces}" in text
    assert sum(tag == "script" for tag, _ in Elements(text).found) == 1


def test_blocks_that_are_empty_are_left_out():
    text = report_page("Results", [], [MEASURED], [], [], {}, ResultTable("Versions", ["package"], []), {})
    assert re.findall(r'<section id="(\w+)"', text) == re.findall(r'href="#(\w+)"', text) == ["measured"]
    assert re.findall(r'<section id="(\w+)"', page()) == ["measured", "published", "commands", "versions", "plan"]


def test_pictures_are_embedded(pictures):
    png, svg = (data_uri(picture.path) for picture in pictures)
    assert base64.b64decode(png.removeprefix("data:image/png;base64,")) == PNG
    assert ET.fromstring(base64.b64decode(svg.removeprefix("data:image/svg+xml;base64,"))).get("width") == "20"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.png", b"GIF89a", "a.png: is not a PNG or SVG picture"),
        ("a.gif", PNG, "a.gif: is not a PNG or SVG picture"),
        ("a.svg", b"", "a.svg: is not a PNG or SVG picture"),
        ("a.png", None, "a.png: No such file or directory"),
    ],
    ids=["a GIF called PNG", "a GIF", "an empty SVG", "no file"],
)
def test_files_that_are_no_pictures(name, content, line, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(line)):
        data_uri(tmp_path / name)


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*quiet.split(), "disable-component-update", "disable-sync"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def opened(browser, pictures, tmp_path):
    """The report, opened from disk on a phone's screen."""
    path = tmp_path / "report.html"
    path.write_text(page(pictures), encoding="utf-8")
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def column(browser, number, table=0):
    rows = "document.querySelectorAll('table')[arguments[0]].tBodies[0].rows"
    return browser.execute_script(f"return [...{rows}].map(row => row.cells[arguments[1]].textContent)", table, number)


def test_a_click_on_a_header_sorts(opened):
    method, mean = opened.find_elements("css selector", "#measured th button")[:2]
    mean.click()
    assert column(opened, 1) == ["-3.0", "9.5", "10.0", "100.0", ""]
    assert column(opened, 0) == ["skip", "emd 10", "emd 9", "uniform", "none"]
    mean.click()
    assert column(opened, 1) == ["100.0", "10.0", "9.5", "-3.0", ""]
    states = [head.get_attribute("aria-sort") for head in opened.find_elements("css selector", "#measured th")[:2]]
    assert states == [None, "descending"]
    method.click()
    assert column(opened, 0) == ["emd 9", "emd 10", "none", "skip", "uniform"]
    assert column(opened, 1, table=1) == ["82.1"]


def test_the_keyboard_sorts_too(opened):
    from selenium.webdriver.common.keys import Keys

    button = opened.find_elements("css selector", "#measured th button")[1]
    opened.execute_script("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    assert column(opened, 1)[0] == "-3.0"
    button.send_keys(Keys.SPACE)
    assert column(opened, 1)[0] == "100.0"


def test_pictures_show_and_only_tables_scroll(opened):
    widths = opened.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert widths == [1, 20]
    page_width, screen = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert page_width <= screen == 390
    wide = "document.querySelector('.wide')"
    inner, outer = opened.execute_script(f"return [{wide}.scrollWidth, {wide}.clientWidth]")
    assert inner > outer


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(opened, scheme):
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    text, ground = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in opened.execute_script(colours))
    assert (text < ground) == (scheme == "light") and abs(text - ground) > 500


def test_print_opens_what_is_folded(opened):
    pdf = base64.b64decode(opened.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert pdf.startswith(b"%PDF")
    assert all(opened.execute_script("return [...document.querySelectorAll('details')].map(part => part.open)"))
