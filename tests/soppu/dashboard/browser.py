"""Debian's Chromium, driven as a person would drive it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

SOPPU = Path(sys.executable).parent / "soppu"
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars")


def missing() -> str:
    """What is not installed here, or ""."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(lacking)} not installed: tests/browser.sh does" if lacking else ""


@contextmanager
def chromium(*flags: str) -> Iterator[Chrome]:
    """A browser with a profile of its own; what pages write to its console is kept."""
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}", *flags):
            options.add_argument(flag)
        driver = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
        driver.set_page_load_timeout(60)
        try:
            yield driver
        finally:
            driver.quit()


def sized(driver: Chrome, width: int, height: int) -> None:
    """The page as wide as that to the pixel; a window of Chromium's own has a least width."""
    told = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", told)


def scheme(driver: Chrome, wanted: str) -> None:
    """Prefer "dark" or "light"."""
    features = [{"name": "prefers-color-scheme", "value": wanted}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def complaints(driver: Chrome) -> list[str]:
    """What the console said since it was asked last."""
    return [one["message"] for one in driver.get_log("browser")]


@contextmanager
def dashboard(registry: Path, runs: Path, *more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`soppu dashboard` in a process of its own: its address and the process."""
    words = [SOPPU, "dashboard", "--registry", registry, "--runs", runs, "--port", "0", *more]
    with subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert re.match(r"http://127\.0\.0\.1:\d+/$", said), said
            yield said.strip().rstrip("/"), process
        finally:
            process.terminate()
