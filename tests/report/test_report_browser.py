"""The report page in a real browser: no scripts, no requests, every image decodes, and nothing overflows."""

import json
import shutil
from pathlib import Path

import pytest

from lightning_ft.report.write import write_report

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def browser_and_driver():
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return browser, shutil.which("chromedriver")


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: pip install -e '.[dev]'")
    browser, program = browser_and_driver()
    if browser is None or program is None:
        pytest.skip("Chromium or its driver is missing: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(program))
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=["run", "comparison"])
def page(request, tmp_path_factory):
    folder = request.getfixturevalue(f"{request.param}_folder")
    return write_report(folder, tmp_path_factory.mktemp("page"))[0]


def load_page(driver, page, width=1200):
    driver.get_log("browser"), driver.get_log("performance")  # discard entries of earlier pages
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(Path(page).as_uri())
    return driver


def requested_urls(driver):
    """URLs that the page requested, each with the reason why the browser blocked it, or None."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    failed = [e["params"] for e in events if e["method"] == "Network.loadingFailed"]
    blocked = {failure["requestId"]: failure.get("blockedReason") for failure in failed}
    requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return {request["request"]["url"]: blocked.get(request["requestId"]) for request in requests}


def test_page_has_no_errors_and_no_requests(driver, page):
    load_page(driver, page)
    urls = requested_urls(driver)
    assert Path(page).as_uri() in urls  # the log records requests
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []
    assert driver.get_log("browser") == []


def test_page_decodes_every_image(driver, page):
    load_page(driver, page)
    sizes = driver.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt.length])")
    assert len(sizes) >= 5
    assert all(complete and width > 0 and alt > 0 for complete, width, alt in sizes)


def test_page_shows_the_headline_on_the_first_screen(driver, page):
    load_page(driver, page)
    headline = driver.find_element("css selector", ".headline")
    assert headline.is_displayed()
    assert "fewer tokens per request" in headline.text
    advice, verdict, *_ = headline.text.splitlines()
    assert "Ship: " in advice
    assert verdict.startswith(("PASS", "FAIL"))
    assert headline.rect["y"] + headline.rect["height"] < 400


@pytest.mark.parametrize("width", [1200, 400])
def test_page_has_no_horizontal_overflow(driver, page, width):
    load_page(driver, page, width)
    driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide, room = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert room == width
    assert wide <= width
    out = driver.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') &&"
        " e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert out == []


def test_page_shows_answers_as_text(driver, run_folder, tmp_path, make):
    load_page(driver, write_report(run_folder, tmp_path)[0])
    assert driver.title == "Fine-tuning report"
    answers = [element.get_attribute("textContent") for element in driver.find_elements("css selector", "pre")]
    assert make.hostile in answers
    details = driver.find_elements("css selector", "details")
    assert [element.get_attribute("open") is not None for element in details[:2]] == [True, False]
    details[1].find_element("css selector", "summary").click()
    assert details[1].find_element("css selector", "pre").is_displayed()


def test_page_policy_blocks_injected_markup(driver, tmp_path, run_folder):
    """The content security policy alone blocks a script and a remote image that are inserted as markup."""
    written = write_report(run_folder, tmp_path)[0]
    page = written.read_text()
    hostile = '<script>document.title="hacked"</script><img src="http://127.0.0.1:9/x.png">'
    written.write_text(page.replace("</main>", f"{hostile}</main>"))
    load_page(driver, written)
    assert driver.title == "Fine-tuning report"
    remote = {url: blocked for url, blocked in requested_urls(driver).items() if url.startswith("http")}
    assert remote == {"http://127.0.0.1:9/x.png": "csp"}  # blocked before it was sent
    assert len(driver.get_log("browser")) == 2  # one error for each


def test_page_supports_dark_mode(driver, page):
    load_page(driver, page)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        plot_background = driver.execute_script("return getComputedStyle(document.images[0]).backgroundColor")
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert sum(map(int, background[4:-1].split(", "))) < 150
    assert plot_background == "rgb(255, 255, 255)"  # text in plots is black
