import io
import re

import pytest

from featurecache.cli import progress, tally
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
    monkeypatch.setattr(tally, "time", found)
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
        "a+b: 75/400 images, 2.5 images/s, 130 s left, 2 failed",
        "a+b: 150/400 images, 2.5 images/s, 100 s left, 2 failed",
        "a+b: 200 images in 80.0 s, 2.5 images/s, 2 failed",
        "mind this",
    ]


def test_one_line_tells_of_all_that_is_at_work(clock, capsys):
    lines = Lines()
    lines.begin("a", 1000, done=600)
    lines.begin("b", 400)
    for _ in range(4):
        clock.now += 10
        lines.advance("a", 50, status="600 reused")
        lines.advance("b", 20)
    assert capsys.readouterr().err.splitlines() == [
        "a: 750/1000 images, 5.0 images/s, 50 s left, 600 reused; b: 40/400 images, 2.0 images/s, 180 s left"
    ]
    lines.advance("a", 200)
    lines.begin("c", 10)
    clock.now += 5
    lines.advance("c", 10)
    for task in "abc":
        lines.end(task)
    assert capsys.readouterr().err.splitlines() == [
        "a: 400 images in 40.0 s, 10.0 images/s, 600 reused",
        "b: 80 images in 40.0 s, 2.0 images/s",
        "c: 10 images in 5.0 s, 2.0 images/s",
    ]


def test_a_task_that_waits_for_another_begins_when_that_is_complete(clock, capsys):
    lines = Lines()
    lines.begin("a", 20)
    lines.begin("b", 20)
    for task in "aabb":
        clock.now += 10
        lines.advance(task, 10)
    lines.end("a")
    lines.end("b")
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "a: 20 images in 20.0 s, 1.0 images/s",
        "b: 20 images in 20.0 s, 1.0 images/s",
    ]


def test_the_line_after_a_task_was_completed_says_so(clock, capsys):
    """The tasks of views that share a recipe end together, when the last of them is complete."""
    lines = Lines()
    lines.begin("a", 20)
    lines.begin("b", 700)
    for task in "aabbbb":
        clock.now += 10
        lines.advance(task, 10)
    for _ in range(2):
        clock.now += 10
        lines.advance("b", 10)
    assert capsys.readouterr().err.splitlines() == [
        "a: 20/20 images, 1.0 images/s, 0 s left; b: 10/700 images, 1.0 images/s, 690 s left",
        "b: 40/700 images, 1.0 images/s, 660 s left",
    ]


def test_what_an_interrupt_left_undone_is_not_called_nothing_to_do(clock):
    counts = tally.Tally()
    counts.begin("b", 700, "images", 50)
    counts.begin("c", 50, "images", 50)
    counts.advance("b", 0, "50 reused")
    assert counts.end("b").in_all() == "b: none of 650 images done, 50 reused"
    assert counts.end("c").in_all() == "c: nothing to do"


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


@pytest.mark.parametrize("width", ["60", "80", "120"])
def test_bars_on_a_terminal(monkeypatch, width):
    class Tty(io.StringIO):
        def isatty(self):
            return True

    screen = Tty()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("NO_COLOR", "1")
    with reporter(quiet=False) as bars:
        assert isinstance(bars, Terminal)
        bars.begin("[a]", 12_000, done=2)
        bars.begin("b", None, "rounds")
        bars.advance("[a]", 4, status="[x] 1 failed")
        bars.advance("b", 3, status="train_loss 0.4123, valid_loss 0.5211, and more than fits")
        bars.redraw()
        bars.note("a [note]")
        bars.end("[a]")
        bars.end("b")
    text = screen.getvalue()
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").splitlines()
    assert max(len(line) for line in lines if not line.startswith("b: ")) <= int(width)
    drawn = next(line for line in lines if "6/12,000" in line)
    assert drawn.startswith("[a] ")
    assert "[x] 1 failed" in drawn
    assert any(line.startswith("b ") and (" 3 rounds" in line or int(width) < 90) for line in lines)
    assert "a [note]" in lines
    (end,) = (line for line in lines if line.startswith("[a]: "))
    assert re.fullmatch(r"\[a\]: 4 images in \d\.\d s, [\d.,]+ images/s, \[x\] 1 failed", end)
    assert lines.index(end) > lines.index("a [note]")
    assert "\x1b[3" not in text, "no colours under NO_COLOR"
