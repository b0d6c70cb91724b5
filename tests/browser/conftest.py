"""A real browser, headless: Debian's chromium through Playwright; what needs it is skipped where either is missing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from explore_kit import write_explored
from stage_two import command

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Visit:
    """A page that is open: `page` is Playwright's; `errors` and `requests` hold what must stay empty."""

    def __init__(self, page):
        self.page, self.errors, self.requests = page, [], []
        page.on("console", lambda message: self.errors.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    @property
    def left(self) -> list[str]:
        """Requests for anything but the file itself and what it holds."""
        return [url for url in self.requests[1:] if not url.startswith("data:")]


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'featurecache[browser]'")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a file as a person would, from disk."""

    @contextmanager
    def opened(path: Path, width: int = 1440, height: int = 900, *, dark: bool = False, touch: bool = False,
               density: float = 1) -> Iterator[Visit]:  # fmt: skip
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", has_touch=touch,
            device_scale_factor=density, is_mobile=touch,
        )  # fmt: skip
        try:
            found = Visit(context.new_page())
            found.page.goto(path.absolute().as_uri())
            found.page.wait_for_load_state("networkidle")
            yield found
        finally:
            context.close()

    return opened


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A store and a cross-validated run of 48 samples in two views, and their `explore.html`."""
    folder = write_explored(tmp_path_factory.mktemp("pages"))
    words = ["explore", folder / "cache", "--dataset", "samples", "--run", folder / "runs/cv", "--by", "kind"]
    done = command(*words, "--out", folder / "explore.html")
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def screenshots(tmp_path) -> Path:
    """Where pictures of pages go: FEATURECACHE_SCREENSHOTS, to be looked at, or a folder of the test."""
    folder = Path(os.environ.get("FEATURECACHE_SCREENSHOTS") or tmp_path / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
