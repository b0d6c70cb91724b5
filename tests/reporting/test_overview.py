import base64
import re

import pytest

from featurecache.reporting.overview import Row, Sample, png_uri, write_overview

REFERENCE = Row("left alone", "runs/left", 40, 0.6, 0.5, 0.7, None, reference=True)


def row(low, high):
    return Row("both", "runs/both", 40, 0.7, 0.6, 0.8, ((low + high) / 2, low, high))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.01, 0.2, "better"), (-0.2, -0.01, "worse"), (-0.01, 0.2, "no gain shown"), (0.0, 0.2, "no gain shown")],
)
def test_words_follow_the_interval(low, high, words):
    assert row(low, high).words() == words


def test_verdict_holds_the_figures():
    assert row(0.01, 0.2).verdict() == "+0.105 [+0.010, +0.200] better"
    assert REFERENCE.verdict() == "the reference"


def test_page_is_self_contained_and_escaped(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG not really")
    sample = Sample("<script>alert(1)</script>", "a & b", (("side <i>", png_uri(picture)),))
    page = write_overview(
        tmp_path / "report.html", title="<b>title</b>", lead="lead", rows=[REFERENCE, row(0.01, 0.2)], samples=[sample]
    ).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<h1>&lt;b&gt;title" in page
    assert base64.b64encode(b"\x89PNG not really").decode() in page
    assert set(re.findall(r'(?:src|href)="([^"]{0,12})', page)) == {"data:image/p", "runs/left/re", "runs/both/re"}
    assert '<a href="runs/left/report.html">left alone</a>' in page
    assert 'alt="&lt;script&gt;alert(1)&lt;/script&gt;, view side &lt;i&gt;"><small>side &lt;i&gt;</small>' in page
    assert "0.700" in page
    assert "better" in page
