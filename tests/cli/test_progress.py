import io

import pytest

from featurecache.cli import progress
from featurecache.cli.bars import Terminal
from featurecache.cli.progress import Lines, Mute, reporter


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_a_line_per_thirty_seconds_and_one_at_the_end(clock, capsys):
    with reporter(quiet=False) as lines:
        assert type(lines) is Lines
        lines.begin("a+b", 400)
        for _ in range(8):
            clock.now += 10
            lines.advance("a+b", 25, status="2 failed")
        lines.end("a+b")
        lines.begin("short", 1)
        clock.now += 1
        lines.advance("short", 1)
        lines.end("short")
        lines.note("mind this")
    assert capsys.readouterr().err.splitlines() == [
        "a+b: 75/400 images, 2.5 images/s, 130 s left 2 failed",
        "a+b: 150/400 images, 2.5 images/s, 100 s left 2 failed",
        "a+b: 200 images in 80.0 s, 2.5 images/s",
        "mind this",
    ]


def test_unknown_totals(clock, capsys):
    lines = Lines()
    lines.begin("fit", None, "steps")
    clock.now += 31
    lines.advance("fit", 62)
    assert capsys.readouterr().err == "fit: 62/? steps, 2.0 steps/s\n"


def test_quiet_says_nothing(clock, capsys):
    with reporter(quiet=True) as mute:
        assert type(mute) is Mute
        mute.begin("x", 1)
        clock.now += 60
        mute.advance("x")
        mute.end("x")
        mute.note("nothing")
    assert capsys.readouterr() == ("", "")


def test_bars_on_a_terminal(monkeypatch):
    class Tty(io.StringIO):
        def isatty(self):
            return True

    screen = Tty()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    with reporter(quiet=False) as bars:
        assert isinstance(bars, Terminal)
        bars.begin("[a]", 10)
        bars.advance("[a]", 4, status="[x] 1 failed")
        bars.advance("[a]", 6)
        bars.note("a [note]")
        bars.end("[a]")
    text = screen.getvalue()
    assert "[a]" in text
    assert "10/10" in text
    assert "[x] 1 failed" in text
    assert "a [note]" in text
    assert "\x1b[3" not in text, "no colours under NO_COLOR"
