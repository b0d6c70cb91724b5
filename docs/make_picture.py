"""Makes the pictures of the README and the guides from the demo: reports and maps as a browser shows them.

    featurecache demo --out /tmp/demo && python docs/make_picture.py /tmp/demo

Writes picture.png (one sample's two views beside the report of a model that was fitted on both), report-WIDTH.png and
explore-WIDTH.png. Needs chromium and `pip install 'featurecache[browser]'`. The emoji are from Noto Emoji (Apache-2.0)
and Twemoji (CC-BY 4.0).
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Browser, sync_playwright

import featurecache as fc
from featurecache.data.shipped import shipped_path

SAMPLE, FOUND = "grinning", "pancakes"
WIDTH, HEIGHT, SIDE = 1100, 720, 200
SCREENS = ((1440, 900), (390, 844))
DOCS = Path(__file__).parent


def screenshot(browser: Browser, page: Path, width: int, height: int, find: str = "") -> Image.Image:
    """The top of a page; with `find` once that sample was looked for on the map."""
    phone = width < 500
    tab = browser.new_page(viewport={"width": width, "height": height}, is_mobile=phone, has_touch=phone)
    tab.goto(page.resolve().as_uri())
    if find:
        tab.fill("#find", find)
        tab.locator("#find").blur()
        tab.wait_for_selector("#tip img")
        tab.evaluate("scrollTo(0, 0)")
    data = tab.screenshot()
    tab.close()
    return Image.open(io.BytesIO(data)).convert("RGB")


def save(image: Image.Image, name: str) -> None:
    """With few colours, which is enough for a page and small."""
    image.quantize(128).save(DOCS / name, optimize=True)


def beside(report: Image.Image) -> Image.Image:
    """The two views of a sample, left of a report."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for number, (view, name) in enumerate((("google", "view 1: Google"), ("twitter", "view 2: Twitter"))):
        image = Image.open(shipped_path(f"emoji/{view}/{SAMPLE}.png")).convert("RGBA").resize((160, 160))
        place = (30, 120 + 240 * number)
        canvas.paste(image, place, image)
        draw.text((place[0] + 20, place[1] + 170), name, "black", font)
    canvas.paste(report, (SIDE + 60, 0))
    draw.line([(SIDE + 40, 0), (SIDE + 40, HEIGHT)], "lightgrey", 2)
    return canvas


def main() -> None:
    """Draw them."""
    demo = Path(sys.argv[1])
    report = demo / "runs" / "fc" / "report.html"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as running:
        page = Path(folder) / "explore.html"
        fc.explore(fc.FeatureDataset(demo / "store", dataset="emoji"), page, run=fc.load_run(demo / "runs" / "fc"))
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        save(beside(screenshot(browser, report, WIDTH - SIDE - 60, HEIGHT)), "picture.png")
        for width, height in SCREENS:
            save(screenshot(browser, report, width, height), f"report-{width}.png")
            save(screenshot(browser, page, width, height, FOUND), f"explore-{width}.png")
        browser.close()


if __name__ == "__main__":
    main()
