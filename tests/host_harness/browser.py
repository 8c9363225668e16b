"""The host's page in a headless Chromium that is on this machine already."""

import contextlib
import os
import shutil

import pytest

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def find_browser() -> str | None:
    """LOWBIT_BROWSER, else the first Chromium on PATH."""
    chosen = os.environ.get("LOWBIT_BROWSER")
    return chosen or next(filter(None, map(shutil.which, EXECUTABLES)), None)


@contextlib.contextmanager
def launch():
    """A running browser, or a skipped test with the reason."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `playwright`: run `python dev.py setup`")
    executable = find_browser()
    if executable is None:
        pytest.skip("found no Chromium on PATH: install one (Debian: `apt-get install chromium`) or set LOWBIT_BROWSER")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=executable, headless=True, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


def open_editor(browser, url: str, timeout_s: float = 60.0):
    """A new page at `url` whose canvas is ready; `page.errors` collects what scripts throw and log as errors."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(timeout_s * 1000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.wait_for_selector("canvas#graph-canvas")
    page.wait_for_function("() => Boolean(window.app && window.app.graph)")
    return page
