"""The Chromium that the tests of the page use."""

import shutil

from playwright.sync_api import Browser, Playwright

INSTALLED = ("chromium-headless-shell", "chromium", "google-chrome")
"""Commands, the lightest first."""


def launch(playwright: Playwright) -> Browser:
    """Start the Chromium that is installed on the machine, else Playwright's."""
    executable = next(filter(None, map(shutil.which, INSTALLED)), None)
    return playwright.chromium.launch(
        executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
    )
