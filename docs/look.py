"""Screenshots of a page in headless Chromium: light, dark, phone and print.

    python docs/look.py PAGE OUT_FOLDER        # or make look

The page is opened from a file, in a fresh profile. Print is the first page of the PDF, drawn by pdftoppm where it is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip
SHOTS = {
    "light": ("--window-size=1000,3200", "--blink-settings=preferredColorScheme=1"),
    "dark": ("--window-size=1000,3200", "--blink-settings=preferredColorScheme=0"),
    "phone": ("--window-size=500,3600", "--blink-settings=preferredColorScheme=1"),
}
"""Headless Chromium makes no window narrower than 500 pixels. Schemes: 0 dark, 1 light."""


def main() -> None:
    page, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("make look needs Chromium; on Debian: apt-get install -y chromium poppler-utils")
    out.mkdir(parents=True, exist_ok=True)
    for name, flags in SHOTS.items():
        _open(browser, page, *flags, f"--screenshot={(out / f'{name}.png').resolve()}")
        print(out / f"{name}.png")
    _open(browser, page, "--no-pdf-header-footer", f"--print-to-pdf={(out / 'print.pdf').resolve()}")
    print(out / "print.pdf")
    if (draw := shutil.which("pdftoppm")) is not None:
        subprocess.run([draw, "-png", "-r", "60", str(out / "print.pdf"), str(out / "print")], check=True)


def _open(browser: str, page: Path, *flags: str) -> None:
    with tempfile.TemporaryDirectory() as profile:
        # The sandbox needs user namespaces, which containers often lack; the page is our own file.
        command = [browser, "--no-sandbox", *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            sys.exit(f"Chromium failed: {done.stderr.strip().splitlines()[-1:]}")


if __name__ == "__main__":
    main()
