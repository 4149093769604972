"""Headless Chromium for tests of pages: Debian's chromium and chromedriver through selenium; tests skip where one of them is missing.

    from tests.browser import PHONE, browser

    def test_page(tmp_path):
        with browser() as b:
            b.get("http://127.0.0.1:8000/")
            b.screenshot(tmp_path / "page.png")
            assert not b.errors()
"""
from __future__ import annotations

import functools
import http.server
import shutil
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest

DESKTOP, PHONE = (1280, 900), (390, 844)
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--force-color-profile=srgb", "--hide-scrollbars", "--lang=en")


class Browser:
    "A selenium driver (`.driver`; its attributes are reachable directly) with the few things that our tests repeat."

    def __init__(self, driver):
        self.driver, self._log = driver, []

    def __getattr__(self, name: str):
        return getattr(self.driver, name)

    def resize(self, size: tuple[int, int]) -> None:
        "Width and height of the page in CSS pixels; below the smallest window of the desktop too, as on a phone."
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": size[0], "height": size[1], "deviceScaleFactor": 1,
                                                                                "mobile": size[0] < 600})

    def js(self, code: str, *arguments):
        "Value of a JavaScript expression; `arguments[0]`... are the given values."
        return self.driver.execute_script(f"return ({code})", *arguments)

    def find(self, css: str) -> list:
        "All elements of a CSS selector, now; maybe none."
        return self.driver.find_elements("css selector", css)

    def wait(self, what, seconds: float = 20):
        "Until a CSS selector finds something, or a function of the browser returns something true: that, or AssertionError with the console."
        from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait
        check = (lambda _: self.find(what)) if isinstance(what, str) else (lambda _: what(self))
        try:
            return WebDriverWait(self.driver, seconds, 0.05, ignored_exceptions=[StaleElementReferenceException]).until(check)
        except TimeoutException:
            raise AssertionError(f"{self.driver.current_url}: still waiting for {what} after {seconds} s; console: {self.console()}") from None

    def console(self) -> list[dict]:
        "Everything that the browser logged since it was started (pages, scripts, network): dicts with level, message, source."
        self._log += self.driver.get_log("browser")
        return self._log

    def errors(self, ignore: tuple[str, ...] = ()) -> list[str]:
        "Messages of level SEVERE, without those that contain one of the given texts."
        return [e["message"] for e in self.console() if e["level"] == "SEVERE" and not any(text in e["message"] for text in ignore)]

    def forget(self) -> None:
        "Forget what the console held."
        self.console()
        self._log = []

    def screenshot(self, path: str | Path, whole: bool = False) -> Path:
        "PNG of the window, or of the whole page however long it is."
        import base64
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        Path(path).write_bytes(base64.b64decode(shot["data"]))
        return Path(path)


def missing() -> str:
    "Why there is no browser here, or an empty text."
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    if not shutil.which("chromedriver"):
        return "chromedriver is not installed"
    return "" if any(map(shutil.which, CHROMIUM)) else "Chromium is not installed"


@contextmanager
def browser(size: tuple[int, int] = DESKTOP, *flags: str) -> Iterator[Browser]:
    "Headless Chromium with an empty profile that is deleted at the end; skips the test where there is none."
    if reason := missing():
        pytest.skip(reason)
    from selenium import webdriver
    with tempfile.TemporaryDirectory(prefix="irnb-chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, CHROMIUM)))
        for flag in (*FLAGS, *flags, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=shutil.which("chromedriver")))
        try:
            driver.set_page_load_timeout(60)
            b = Browser(driver)
            b.resize(size)
            yield b
        finally:
            driver.quit()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        "Files; an empty answer for the icon that browsers ask for unasked."
        if self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *arguments) -> None:
        "Nothing on the terminal."


@contextmanager
def serve(folder: str | Path) -> Iterator[str]:
    "A folder on a free port of the local host; yields its address."
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
