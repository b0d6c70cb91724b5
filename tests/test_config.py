from pathlib import Path

import pytest

from featurecache.config import ExtractConfig, FitConfig, JointConfig, Settings, SplitConfig, Tap, for_view
from featurecache.errors import InputError, MissingFileError

EXTRACT = {"manifest": "m.csv", "store": "cache"}


def test_every_stage_survives_toml(tmp_path):
    body = {
        "body": {"*": "torchvision/resnet18", "a": "run:joint"},
        "resize": "none",
        "mean": [0.1, 0.2, 0.3],
        "seed": 3,
    }
    fit = {"store": "c", "dataset": "m", "target": ["y"], "tap": {"a": ["layer4"]}, "settings": {"C": "auto"}}
    configs = [
        ExtractConfig.create({**EXTRACT, **body, "views": {"a": "x"}, "tap": ["layer4:avg", "penultimate"]}),
        FitConfig.create(fit),
        JointConfig.create({"manifest": "m.csv", "target": ["y"], "augment": []}),
    ]
    for config in configs:
        path = tmp_path / "stage.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        assert type(config).from_toml(path) == config


def test_a_value_for_all_views_or_per_view():
    config = ExtractConfig.create({**EXTRACT, "image_size": {"*": 64, "a": 32}, "body": "x/y", "tap": {"a": "l:max"}})
    assert [for_view(config.image_size, view, 0) for view in "ab"] == [32, 64]
    assert for_view(config.body, "a", "") == "x/y"
    assert config.tap == {"a": (Tap(module="l", pool="max"),)}
    assert FitConfig.create({"store": "c", "dataset": "m", "target": ["y"], "tap": ["a", "b"]}).tap == {"*": ("a", "b")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stor": "c"}, "unknown key 'stor'. Did you mean 'store'?"),
        ({"store": "c"}, "manifest: Field required"),
        ({**EXTRACT, "batch_size": "big"}, "batch_size: Input should be a valid integer, unable to parse string as an "
         "integer or 'auto' (found 'big')"),
        ({**EXTRACT, "precision": "fp8"}, "precision: Input should be 'auto', 'fp32', 'bf16' or 'fp16' (found 'fp8')"),
        ({**EXTRACT, "tap": "layer4:avrg"}, "unknown pooling 'avrg'. Did you mean 'avg'?"),
        ({**EXTRACT, "tap": ":avg"}, "no module name before the colon"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(InputError) as caught:
        ExtractConfig.create(values, source="here")
    assert message in str(caught.value)
    assert len(caught.value.problems) <= 1


def test_all_problems_at_once():
    with pytest.raises(InputError) as caught:
        FitConfig.create({"target": 3, "seed": "x", "store": "c"}, source="fit")
    assert {problem.partition(":")[0] for problem in caught.value.problems} == {"target", "seed", "dataset"}
    assert str(caught.value).startswith("fit: not valid\n")


@pytest.mark.parametrize("values", [{"valid": 0}, {"test": 1}, {"valid": 0.6, "test": 0.5}])
def test_fractions_must_leave_training_rows(values):
    with pytest.raises(InputError, match=r"fractions in \(0, 1\) that leave rows for training"):
        SplitConfig.create(values)


def test_toml_files_that_are_none(tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        SplitConfig.from_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("seed = ", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad.toml: not valid TOML"):
        SplitConfig.from_toml(tmp_path / "bad.toml")


def test_settings_are_frozen():
    class Own(Settings):
        path: Path = Path("x")

    with pytest.raises(ValueError, match="frozen"):
        Own().path = Path("y")


def test_taps_are_written_as_they_are_read():
    assert [str(Tap.parse(text)) for text in ("layer4", "layer4:avg")] == ["layer4", "layer4:avg"]
