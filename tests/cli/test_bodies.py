import pytest
from plugin_joint import write_samples
from stage_two import TINY, TWO, command, quick

import featurecache as fc


def test_list_by_word():
    done = command("bodies", "list", "squeezenet")
    assert done.out.splitlines()[:2] == ["torchvision/squeezenet1_0", "torchvision/squeezenet1_1"]
    found = command("bodies", "list", "squeezenet1_1", "--json").json
    assert found["outputs"][0] == "torchvision/squeezenet1_1"
    assert found["n"] == len(found["outputs"])
    assert command("bodies", "list", "nonsense").out == "no body has 'nonsense' in its name\n"


def test_show_names_modules_with_shapes_and_the_default_tap():
    done = command("bodies", "show", "torchvision/squeezenet1_1", "--image-size", 64)
    assert done.status == 0
    assert done.out.startswith("torchvision/squeezenet1_1 at 64 x 64, 3 channels\n")
    penultimate = next(line for line in done.out.splitlines() if line.startswith("penultimate"))
    assert "512" in penultimate
    assert "--body torchvision/squeezenet1_1 --tap NAME:POOL" in done.err
    found = command("bodies", "show", "torchvision/squeezenet1_1", "--image-size", 64, "--json").json
    assert {tap["name"]: tap["shape"] for tap in found["taps"]}["features"] == [512, 3, 3]
    grey = command("bodies", "show", "torchvision/squeezenet1_1", "--channels", 1, "--json").json
    assert grey["image_size"] == [224, 224]


def test_unknown_bodies_name_the_near_one():
    done = command("bodies", "show", "torchvision/squeezenet11")
    assert done.status == 2
    assert "Did you mean 'torchvision/squeezenet1_1'?" in done.err


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bodies")
    with quick():
        return fc.finetune_joint(
            write_samples(folder, 40), views=TWO, **TINY, target="label", out=folder / "joint", epochs=1,
            freeze_epochs=0, workers=1, bootstrap=0, settings={"hidden": [4]},
        )  # fmt: skip


def test_show_the_body_of_a_run(joint):
    done = command("bodies", "show", f"run:{joint.path}", "--view", "a")
    assert done.status == 2
    assert "names the factory 'plugin_joint:tiny' as its body. Nothing was imported." in done.err
    done = command("bodies", "show", f"run:{joint.path}", "--view", "a", "--trust-factory", "plugin_joint:tiny")
    assert done.status == 0
    assert "features.6" in done.out
    done = command("bodies", "show", f"run:{joint.path}", "--view", "c")
    assert "no body for view 'c'." in done.err
