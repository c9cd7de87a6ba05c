"""A real headless Chromium for the tests of web pages: Debian's, driven by Playwright, which downloads nothing here.

with Chromium() as chromium, chromium.tab() as tab:
    tab.page.goto("http://127.0.0.1:…")         # what a Tab finds wrong fails the test at the end of its block
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage, Dialog, Page, Request

NAMES = ("chromium", "chromium-browser", "google-chrome")
LONGEST_MS = 90_000.0  # to wait for something that must come; a machine that also trains a model needs some of it
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
OWN_SCHEMES = ("data", "blob", "about")
ARGUMENTS = (
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",  # nothing outside is reached
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
)


def why_not() -> str:
    """Why there can be no browser here; "" where there can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install -e '.[test]'"
    if find_chromium() is None:
        return "no Chromium is installed: apt-get install chromium"
    return ""


def find_chromium() -> str | None:
    """The program, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Tab:
    """A page in a browser profile of its own, and what went wrong there.

    Attributes:
        problems: errors on the console, dialogs (no page of ours opens one, so a script of somebody else did),
            requests that would have left this machine.
    """

    page: Page
    problems: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        """Take note of what goes wrong in a page."""
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        page.on("dialog", self._opened)
        page.on("request", self._asked)

    def check(self) -> None:
        """Fail if something went wrong since the last time."""
        problems, self.problems = self.problems, []
        assert not problems, "\n".join(problems)

    def _said(self, message: ConsoleMessage) -> None:
        url = str(message.location.get("url", ""))
        if message.type == "error" and not url.endswith("/favicon.ico"):  # the browser asks for it by itself
            self.problems.append(f"console: {message.text} ({url})")

    def _opened(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _asked(self, request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme not in OWN_SCHEMES and url.hostname not in LOOPBACK:
            self.problems.append(f"request: {request.url}")


@dataclass
class Profile:
    """One user of a browser."""

    context: BrowserContext

    @contextmanager
    def tab(self) -> Iterator[Tab]:
        """A page whose problems are errors at the end of the block."""
        page = self.context.new_page()
        try:
            tab = Tab(page)
            tab.watch(page)
            yield tab
            tab.check()
        finally:
            page.close()


class Chromium:
    """A browser that runs while the block does."""

    def __enter__(self) -> Chromium:
        from playwright.sync_api import sync_playwright

        self._driver = sync_playwright().start()
        try:
            self._browser = self._driver.chromium.launch(
                executable_path=find_chromium(),
                args=list(ARGUMENTS),
                chromium_sandbox=os.geteuid() != 0,  # as root it has none
            )
        except BaseException:
            self._driver.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.close()
        self._driver.stop()

    @contextmanager
    def profile(self, **settings: Any) -> Iterator[Profile]:
        """Somebody's browser: tabs of one profile share what pages keep, and what was loaded once.

        Args:
            settings: of Browser.new_context, as `locale`.
        """
        made = self._browser.new_context(**{"locale": "en-US", "viewport": {"width": 1100, "height": 800}, **settings})
        try:
            made.set_default_timeout(LONGEST_MS)
            yield Profile(made)
        finally:
            made.close()

    @contextmanager
    def tab(self, **settings: Any) -> Iterator[Tab]:
        """A tab in a profile of its own."""
        with self.profile(**settings) as profile, profile.tab() as tab:
            yield tab
