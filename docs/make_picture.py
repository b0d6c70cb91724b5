"""Makes docs/picture.png: one sample's two views beside the report of a model that was fitted on both.

    featurecache demo --out /tmp/demo && python docs/make_picture.py /tmp/demo

Needs chromium and `pip install 'featurecache[browser]'`. The emoji are from Noto Emoji (Apache-2.0) and Twemoji
(CC-BY 4.0).
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

from featurecache.data.shipped import shipped_path

SAMPLE = "grinning"
WIDTH, HEIGHT, SIDE = 1100, 720, 200


def screenshot(page: Path) -> Image.Image:
    """The top of a page, as a browser shows it."""
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH - SIDE - 60, "height": HEIGHT})
        tab.goto(page.resolve().as_uri())
        data = tab.screenshot()
        browser.close()
    return Image.open(io.BytesIO(data)).convert("RGB")


def main() -> None:
    """Draw it."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for number, (view, name) in enumerate((("google", "view 1: Google"), ("twitter", "view 2: Twitter"))):
        image = Image.open(shipped_path(f"emoji/{view}/{SAMPLE}.png")).convert("RGBA").resize((160, 160))
        place = (30, 120 + 240 * number)
        canvas.paste(image, place, image)
        draw.text((place[0] + 20, place[1] + 170), name, "black", font)
    canvas.paste(screenshot(Path(sys.argv[1]) / "runs" / "fc" / "report.html"), (SIDE + 60, 0))
    draw.line([(SIDE + 40, 0), (SIDE + 40, HEIGHT)], "lightgrey", 2)
    canvas.quantize(128).save(Path(__file__).with_name("picture.png"), optimize=True)


if __name__ == "__main__":
    main()
