import pytest
from typer.testing import CliRunner

from featurecache.calls import follows
from featurecache.cli import app
from featurecache.cli.joint import augment_options


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, {}),
        (["none"], {"augment": {"*": ()}}),
        (["flip,mixup"], {"augment": {"*": ("flip", "mixup")}}),
        (["lateral=crop"], {"augment": {"*": ("crop", "flip"), "lateral": ("crop",)}}),
        (["flip", "lateral=none"], {"augment": {"*": ("flip",), "lateral": ()}}),
    ],
)
def test_augment_is_given_for_all_views_or_one(values, expected):
    assert augment_options(values) == expected


def test_only_the_first_process_of_torchrun_talks(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not follows()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert follows()
    monkeypatch.setenv("RANK", "0")
    assert not follows()


def test_help_shows_the_schedule_and_the_engine_in_panels_of_their_own():
    text = CliRunner().invoke(app, ["finetune-joint", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for words in ("Schedule", "--unfreeze", "--ema", "--patience", "Engine and checkpoints", "--checkpoint-every"):
        assert words in text


def test_bad_options_end_with_status_2(tmp_path):
    found = CliRunner().invoke(app, ["finetune-joint", str(tmp_path / "m.csv"), "--target", "x", "--lr", "fnd"])
    assert found.exit_code == 2
