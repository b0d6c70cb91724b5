import io

import numpy as np
import polars as pl
import pytest
from explore_kit import EVIL, EVIL_ID
from PIL import Image
from stage_two import command

from featurecache.reporting.explore import render

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
FRAME = 50  # milliseconds
MANY = 20_000


def clean(visit):
    """No console errors, nothing asked for but the file itself, by the browser's own list of resources too."""
    assert visit.errors == []
    assert visit.left == []
    names = visit.page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in names if not name.startswith("data:")] == []


def settled(page):
    """Wait for the frames that are due."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def dot(page, row):
    """Where a sample is drawn, in pixels of the window, as long as nothing was zoomed or moved."""
    page.evaluate("document.getElementById('map').scrollIntoView({ block: 'center' })")
    settled(page)
    x, y = page.evaluate(
        """(row) => {
          const data = JSON.parse(document.getElementById("data").textContent), box = map.getBoundingClientRect();
          const spread = (k) => Math.max(...data.xy.map((point) => Math.abs(point[k]))) || 1;
          const scale = Math.min((box.width / 2 - 24) / spread(0), (box.height / 2 - 24) / spread(1));
          const [x, y] = data.xy[row];
          return [box.left + box.width / 2 + x * scale, box.top + box.height / 2 - y * scale];
        }""",
        row,
    )
    return x, y


def around(page):
    """Draw with the lasso around the whole map, which is brought into the window."""
    page.evaluate("document.getElementById('map').scrollIntoView({ block: 'center' })")
    box = page.locator("#map").bounding_box()
    left, top, right, bottom = box["x"] + 8, box["y"] + 8, box["x"] + box["width"] - 8, box["y"] + box["height"] - 8
    page.mouse.move(left, top)
    page.mouse.down()
    for corner in ((right, top), (right, bottom), (left, bottom)):
        page.mouse.move(*corner, steps=3)
    page.mouse.up()


@pytest.mark.parametrize(("width", "height", "dark"), [(1440, 900, False), (1440, 900, True), (390, 844, False)])
@pytest.mark.parametrize("name", ["explore.html", "runs/cv/report.html"])
def test_pages_open_from_disk_and_ask_for_nothing(visit, home, screenshots, name, width, height, dark):
    with visit(home / name, width, height, dark=dark, touch=width < 500) as opened:
        page = opened.page
        if name == "explore.html":
            page.fill("#find", EVIL_ID)
            settled(page)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, "the page scrolls sideways"
        page.screenshot(path=screenshots / f"{name.split('/')[-1]}-{width}{'-dark' * dark}.png", full_page=True)
        clean(opened)


def test_no_table_is_cut_on_paper(visit, home):
    words = ["--dataset", "samples", "--target", "first,second", "--head", "logistic", "--bootstrap", 20]
    assert command("fit-head", home / "cache", *words, "--out", home / "runs/labels").status == 0
    wider = """[...document.querySelectorAll('.scroll')].filter((table) => table.scrollWidth > table.clientWidth + 1)
      .map((table) => table.getAttribute('aria-label'))"""
    for name in ("cv", "labels"):
        with visit(home / "runs" / name / "report.html", 703, 1000) as opened:  # A4 less margins of 12 mm
            assert opened.page.evaluate(wider), "on a screen they scroll"
            opened.page.emulate_media(media="print")
            assert opened.page.evaluate(wider) == []
    words[3] = "kind"
    assert command("fit-head", home / "cache", *words, "--out", home / "runs/kinds").status == 0
    with visit(home / "runs/kinds/report.html") as opened:
        assert opened.page.evaluate(wider) == [], "the figures of several classes have a desktop's width"


def test_a_table_that_goes_on_sideways_is_shaded_there(visit, home):
    with visit(home / "runs/cv/report.html", 390, 844, touch=True) as opened:
        table = opened.page.get_by_role("region", name="Views and recipes")
        assert table.evaluate("(table) => table.scrollWidth > table.clientWidth + 40")

        def shades():
            image = np.asarray(Image.open(io.BytesIO(table.screenshot())).convert("L"), float)
            return np.median(image[:, 0]), np.median(image[:, -1])

        left, right = shades()
        assert right < left - 15
        table.evaluate("(table) => table.scrollTo(table.scrollWidth, 0)")
        settled(opened.page)
        left, right = shades()
        assert left < right - 15


def test_the_map_on_paper(visit, home):
    with visit(home / "explore.html", 703, 1000) as opened:
        page = opened.page
        page.emulate_media(media="print")
        for gone in ("#card", "#chosen", ".bar"):
            assert page.locator(gone).is_hidden(), gone
        assert page.locator("#pairs tbody th button").first.is_visible(), "the ids of samples"
        dots = page.locator("#legend .dot")
        assert dots.first.is_visible()
        assert dots.first.evaluate("(dot) => getComputedStyle(dot).printColorAdjust") == "exact"
        page.emulate_media(media="screen")
        page.fill("#find", "s005")
        page.click("#card > button")
        page.emulate_media(media="print")
        assert page.locator("#card h2").is_visible()
        assert page.locator("#list").is_visible()
        assert page.locator("#card > button").is_hidden()


@pytest.mark.parametrize("dark", [False, True])
def test_unknown_can_be_seen(visit, home, dark):
    with visit(home / "explore.html", dark=dark) as opened:
        found = opened.page.evaluate(
            """() => ["--unknown", "--card"].map((name) => {
              const colour = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
              return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
            })"""
        )
        light = [0.05 + np.dot((0.2126, 0.7152, 0.0722), (np.array(each) / 255) ** 2.2) for each in found]
        assert max(light) / min(light) >= 3, "contrast of what is no text, WCAG 1.4.11"


def test_hover_shows_both_views_and_html_as_text(visit, home):
    with visit(home / "explore.html") as opened:
        page = opened.page
        assert page.locator("#tip").is_hidden()
        page.mouse.move(*dot(page, 0))
        page.wait_for_selector("#tip img")
        pictures = page.locator("#tip img")
        assert pictures.count() == 2
        assert page.locator("#tip figcaption").all_inner_texts() == ["a", "b"]
        assert page.evaluate(
            "[...document.querySelectorAll('#tip img')].every((i) => i.complete && i.naturalWidth > 8)"
        )
        told = page.locator("#tip").inner_text()
        # A copy lies on the very same place; either may be on top.
        assert EVIL_ID in told or "s002" in told
        page.fill("#find", "s002")
        settled(page)
        assert EVIL in page.locator("#card").inner_text()
        assert EVIL in page.locator("#legend").inner_text()
        assert page.locator("#card b, #legend b, #card script, [onerror]").count() == 0
        clean(opened)


def test_click_neighbour_lasso_and_legend(visit, home):
    with visit(home / "explore.html") as opened:
        page = opened.page
        page.mouse.click(*dot(page, 5))
        assert page.locator("#card h2").inner_text() == "s005"
        assert page.locator("#card .near button").count() == 8
        first = page.locator("#card .near button").first
        other = first.inner_text().split("\n")[0]
        first.click()
        assert page.locator("#card h2").inner_text() == other
        page.click("#lasso")
        around(page)
        ids = page.locator("#list").input_value().split("\n")
        assert len(ids) == 48
        assert ids[0] == EVIL_ID
        page.click("#copy")
        expect = pytest.importorskip("playwright.sync_api").expect
        expect(page.locator("#copy")).to_have_text("Copied")  # waiting for a function would need eval
        page.click("#clear")
        page.select_option("#colour", label="kind")
        page.locator("#legend button", has_text="p").first.click()  # hidden dots are not collected
        around(page)
        table = pl.read_csv(home / "data/samples.csv")
        assert len(page.locator("#list").input_value().split("\n")) == table.filter(pl.col("kind") != "p").height
        clean(opened)


def test_keys_alone_are_enough(visit, home):
    with visit(home / "explore.html") as opened:
        page = opened.page
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "map":
                break
        else:
            pytest.fail("the map can't be reached by Tab")
        page.keyboard.press("ArrowRight")
        first = page.locator("#card h2").inner_text()
        page.keyboard.press("ArrowRight")
        assert page.locator("#card h2").inner_text() != first
        page.keyboard.press("Enter")
        assert page.locator("#list").input_value() == page.locator("#card h2").inner_text()
        assert page.locator("#live").inner_text().startswith(page.locator("#card h2").inner_text())
        page.keyboard.press("Escape")
        assert page.locator("#card h2").inner_text() == "No sample chosen"
        clean(opened)


def test_tap_shows_the_pictures_on_a_phone(visit, home):
    with visit(home / "explore.html", 390, 844, touch=True, density=2) as opened:
        page = opened.page
        page.touchscreen.tap(*dot(page, 0))
        page.wait_for_selector("#tip img")
        assert page.locator("#tip img").count() == 2
        assert page.locator("#card .views img").count() >= 2
        clean(opened)


def test_twenty_thousand_points_stay_fluid(visit, tmp_path):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, MANY)
    xy = rng.normal(size=(MANY, 2)) * 0.2 + np.stack([np.cos(label), np.sin(label)], axis=1) * 0.5
    field = {"name": "class", "kind": "category", "labels": list("abcde"), "values": label.tolist(), "role": "class",
             "card": True, "colour": True}  # fmt: skip
    nothing = {name: [[]] * MANY for name in ("near", "cosine", "pictures")} | {"duplicates": [], "suspects": []}
    ids = [f"s{i}" for i in range(MANY)]
    data = {"ids": ids, "views": ["a"], "xy": xy.round(5).tolist(), "fields": [field], **nothing}
    path = tmp_path / "many.html"
    path.write_text(
        render(
            data, title="many", run="", method="pca", variance=0.5, n=MANY, total=MANY, views=("a",), notes=[],
            alike=0.95, n_pairs=0, n_doubts=0, listed=200, judged="", share=None, regression=False,
        ),
        encoding="utf-8",
    )  # fmt: skip
    with visit(path) as opened:
        page = opened.page
        took = []
        for _ in range(15):
            page.evaluate("(id) => document.getElementById(id).click()", "in" if len(took) % 2 else "all")
            settled(page)
            took.append(float(page.locator("#map").get_attribute("data-ms")))
        assert np.median(took) < FRAME, f"milliseconds a frame: {took}"
        clean(opened)
