import hashlib
import json
import os
import pickle
import sys
from dataclasses import replace

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from featurecache.bodies import families
from featurecache.bodies.names import list_bodies
from featurecache.bodies.registry import body_record, load_body, load_run_body
from featurecache.bodies.taps import resolve_taps
from featurecache.config import Tap
from featurecache.errors import DependencyError, InputError, MissingFileError, RunError

SMALL = "plugin_bodies:small"


@pytest.fixture
def resnet_state():
    torch.manual_seed(3)
    return torchvision.models.resnet18(weights=None).state_dict()


def test_lists_classification_models_by_word():
    names = list_bodies("DenseNet")
    assert "torchvision/densenet121" in names
    assert "timm/densenet121" in names
    assert all("densenet" in name for name in names)
    everything = list_bodies()
    assert sum(name.startswith("torchvision/") for name in everything) >= 80
    assert not [name for name in everything if "fasterrcnn" in name]


def test_torchvision_body_is_frozen_in_eval_mode_with_the_preprocessing_of_its_weights():
    body = load_body("torchvision/resnet50", "none", seed=0)
    assert not body.module.training
    assert not any(p.requires_grad for p in body.module.parameters())
    assert (body.architecture, body.classifier, body.categories) == ("torchvision/resnet50", "fc", None)
    own = body.preprocessing
    assert (own.resize, own.crop, own.interpolation, own.mean) == (232, 224, "bilinear", (0.485, 0.456, 0.406))


def test_random_weights_are_the_same_for_a_seed_and_leave_the_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = load_body("torchvision/squeezenet1_1", "none", seed=1).module.state_dict()
    assert torch.equal(torch.rand(3), expected)
    two = load_body("torchvision/squeezenet1_1", "none", seed=1).module.state_dict()
    other = load_body("torchvision/squeezenet1_1", "none", seed=2).module.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_random_weights_need_a_seed():
    with pytest.raises(InputError, match="weights 'none' means random weights: give --seed N"):
        load_body("torchvision/resnet18", "none")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torchvision/resnet19",
            r"no body 'torchvision/resnet19'. Did you mean 'torchvision/resnet18'\?.*bodies list res",
        ),
        ("densenet121", r"Did you mean 'torchvision/densenet121'\?"),
        ("timm/resnet18x", r"no body 'timm/resnet18x'. Did you mean 'timm/resnet18\w*'\?"),
        ("timm/hf-hub:someone/net", "no body 'timm/hf-hub:someone/net'"),
        ("", "no body ''"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, message):
    with pytest.raises(InputError, match=message):
        load_body(name, "none", seed=0)


def test_timm_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DependencyError, match=r"pip install 'featurecache\[timm\]'"):
        load_body("timm/resnet18", "none", seed=0)
    families = {name.partition("/")[0] for name in list_bodies()}
    assert "torchvision" in families
    assert "timm" not in families


def test_timm_preprocessing_follows_its_configuration():
    body = load_body("timm/resnet18.a1_in1k", "none", seed=0)
    assert body.pre_logits
    assert body.classifier == "fc"
    own = body.preprocessing
    assert (own.resize, own.crop, own.interpolation, own.resize_mode) == (235, 224, "bicubic", "crop")


def test_parameters_that_a_file_replaces_are_not_drawn():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    spec = families.Spec("file", state={})
    with families._Undrawn():
        nn.Conv2d(3, 4, 3)
        nn.init.normal_(nn.Parameter(torch.empty(4)))
    assert torch.equal(torch.get_rng_state(), before)
    built = families._constructed(spec, None, lambda: nn.ParameterList([torch.rand(3)]))
    torch.manual_seed(0)
    assert torch.equal(built[0], torch.rand(3))  # what is not drawn in place is left as it is


def test_hub_failure_says_how_to_pass_a_file(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(
        InputError, match=r"squeezenet1_1: weights IMAGENET1K_V1 can't be had from https.*unreachable"
    ) as e:
        load_body("torchvision/squeezenet1_1")
    assert "--weights FILE" in str(e.value)
    assert "--weights shipped" in str(e.value)
    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(InputError, match=r"timm/resnet18: weights can't be had from the hub .Network is unreachable"):
        load_body("timm/resnet18")


@pytest.mark.parametrize("model", ["googlenet", "inception_v3"])
def test_hub_weights_go_through_torchvision_with_their_hash(monkeypatch, model):
    made = torchvision.models.get_model(model, weights=None, aux_logits=True, init_weights=False)
    seen = {}

    def download(url, **kwargs):
        seen.update(kwargs, url=url)
        return made.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    body = load_body(f"torchvision/{model}", "IMAGENET1K_V1")
    assert seen["check_hash"] is True
    assert body.module.transform_input
    assert not body.module.aux_logits
    assert len(body.categories) == 1000
    assert torch.equal(body.module.fc.weight, made.fc.weight)


def test_unknown_hub_weights():
    with pytest.raises(InputError, match=r"no weights 'IMAGENET1K_V9'. Did you mean 'IMAGENET1K_V\d'\? Known: .*none"):
        load_body("torchvision/resnet50", "IMAGENET1K_V9")
    with pytest.raises(InputError, match="timm's weights are part of the name"):
        load_body("timm/resnet18", "IMAGENET1K_V1")
    with pytest.raises(InputError, match="no weights are shipped for it; they are for torchvision/squeezenet1_1"):
        load_body("torchvision/resnet18", "shipped")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path, resnet_state, suffix):
    path = tmp_path / f"w{suffix}"
    save_file(resnet_state, path) if suffix == ".safetensors" else torch.save(resnet_state, path)
    body = load_body("torchvision/resnet18", str(path))
    assert all(torch.equal(value, resnet_state[name]) for name, value in body.module.state_dict().items())


@pytest.mark.parametrize("wrap", ["state_dict", "model", "lightning", "parallel"])
def test_common_wrappers_are_taken_off(tmp_path, resnet_state, wrap):
    if wrap == "parallel":
        saved = {f"module.{name}": value for name, value in resnet_state.items()}
    elif wrap == "lightning":
        saved = {"epoch": 3, "state_dict": {f"model.{name}": value for name, value in resnet_state.items()}}
    else:
        saved = {"epoch": 3, wrap: resnet_state}
    torch.save(saved, tmp_path / "w.ckpt")
    body = load_body("torchvision/resnet18", str(tmp_path / "w.ckpt"))
    assert torch.equal(body.module.conv1.weight, resnet_state["conv1.weight"])


def test_old_densenet_files_load(tmp_path):
    state = torchvision.models.densenet121(weights=None).state_dict()
    old = {name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for name, v in state.items()}
    old = {name: value for name, value in old.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "densenet121.pth")
    body = load_body("torchvision/densenet121", str(tmp_path / "densenet121.pth"))
    name = "features.denseblock1.denselayer1.conv2.weight"
    assert torch.equal(body.module.state_dict()[name], state[name])


def test_other_number_of_classes_is_accepted(tmp_path):
    for name in ("resnet18", "squeezenet1_1"):
        state = torchvision.models.get_model(name, weights=None, num_classes=7).state_dict()
        save_file(state, tmp_path / f"{name}.safetensors")
        body = load_body(f"torchvision/{name}", str(tmp_path / f"{name}.safetensors"))
        assert body.module.get_submodule(body.classifier).weight.shape[0] == 7
        assert body.module(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_weights_that_do_not_fit_are_listed(tmp_path, resnet_state):
    resnet_state["extra.weight"] = torch.zeros(2)
    resnet_state["conv1.weight"] = torch.zeros(64, 3, 5, 5)
    del resnet_state["bn1.bias"]
    save_file(resnet_state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="does not fit ResNet: 3 of 122 tensors differ") as e:
        load_body("torchvision/resnet18", str(tmp_path / "w.safetensors"))
    assert "missing: bn1.bias (64,)" in str(e.value)
    assert "unexpected: extra.weight (2,)" in str(e.value)
    assert "other shape: conv1.weight is (64, 3, 5, 5), the body has (64, 3, 7, 7)" in str(e.value)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "zipped.pth"])
def test_a_pickle_disguised_as_weights_executes_nothing(tmp_path, name):
    trap = tmp_path / "executed"
    if name == "zipped.pth":
        torch.save({"a": Payload(trap)}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"a": Payload(trap)}))
    with pytest.raises(InputError, match="Nothing in it was executed") as caught:
        load_body("torchvision/resnet18", str(tmp_path / name))
    assert not trap.exists()
    for advice in ("weights_only", "Re-running", "will likely succeed", "you have two options", "\n"):
        assert advice not in str(caught.value)
    if name == "zipped.pth":
        assert str(caught.value).endswith("mkdir')")


def test_bad_weight_files(tmp_path):
    with pytest.raises(MissingFileError, match=r"weights '.*gone.pth': no such file"):
        load_body("torchvision/resnet18", str(tmp_path / "gone.pth"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="Nothing in it was executed"):
        load_body("torchvision/resnet18", str(tmp_path / "text.pth"))
    (tmp_path / "w.npz").write_text("hello")
    with pytest.raises(InputError, match=r"weights must be one of .safetensors, .pth"):
        load_body("torchvision/resnet18", str(tmp_path / "w.npz"))
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "numbers.pth")
    with pytest.raises(InputError, match=r"2 of 2 entries are not tensors .epoch, loss."):
        load_body("torchvision/resnet18", str(tmp_path / "numbers.pth"))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds a list, not tensors by name"):
        load_body("torchvision/resnet18", str(tmp_path / "list.pth"))


def test_image_size_follows_from_the_position_embedding():
    state = {"encoder.pos_embedding": torch.zeros(1, 10, 4), "conv_proj.weight": torch.zeros(4, 3, 32, 32)}
    assert families._image_size(state) == {"image_size": 96}
    assert families._image_size({}) == {}


@pytest.mark.slow
def test_vision_transformer_takes_its_image_size_from_the_file(tmp_path):
    state = torchvision.models.vit_b_32(weights=None, image_size=96).state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    body = load_body("torchvision/vit_b_32", str(tmp_path / "vit.safetensors"))
    assert body.preprocessing.size() == (96, 96)
    assert body.module(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)


def test_channels_are_adapted_with_their_statistics():
    rgb = load_body("torchvision/resnet18", "none", seed=0)
    grey = load_body("torchvision/resnet18", "none", seed=0, channels=1)
    assert grey.module.conv1.weight.shape[1] == 1
    assert grey.preprocessing.channels == 1
    assert len(grey.preprocessing.mean) == len(grey.preprocessing.std) == 1
    assert torch.allclose(grey.module.conv1.weight[:, 0], rgb.module.conv1.weight.sum(1))
    assert load_body("plugin_bodies:grey").preprocessing.channels == 1


def test_adapted_weights_load_again(tmp_path):
    five = load_body("torchvision/resnet18", "none", seed=0, channels=5)
    save_file(five.module.state_dict(), tmp_path / "w.safetensors")
    again = load_body("torchvision/resnet18", str(tmp_path / "w.safetensors"), channels=5)
    assert torch.equal(again.module.conv1.weight, five.module.conv1.weight)


def test_factory_brings_preprocessing_and_categories():
    body = load_body(SMALL)
    assert body.architecture == SMALL
    assert (body.preprocessing.crop, body.preprocessing.mean) == (32, (0.5, 0.5, 0.5))
    assert body.categories == ("a", "b")
    assert body.classifier is None
    same = load_body(SMALL)
    assert torch.equal(body.module.conv1.weight, same.module.conv1.weight)
    assert load_body("plugin_bodies:small_without_preprocessing").preprocessing.crop == 224
    assert load_body("plugin_bodies:torchvision_resnet").classifier == "fc"


def test_factory_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "plugin_bodies_here.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Conv2d(3, 2, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert isinstance(load_body("plugin_bodies_here:make").module, nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plugin_bodies:smal", r"has no function 'smal'. Did you mean 'small'\?"),
        ("plugin_bodies:NOT_CALLABLE", "has no function 'NOT_CALLABLE'"),
        ("plugin_bodies_gone:make", "'plugin_bodies_gone' can't be imported: No module named"),
        ("plugin_bodies:no_module", "gave a list, not a torch.nn.Module"),
        ("plugin_bodies:broken", "the factory raised KeyError: 'weights.bin'"),
        ("plugin_bodies:misspelt", r"unknown key 'crops' in its `preprocessing`. Did you mean 'crop'\?"),
    ],
)
def test_bad_factories(name, message):
    with pytest.raises(InputError, match=message):
        load_body(name)


def test_factory_has_no_named_weights():
    with pytest.raises(InputError, match="no weights 'V1'; a factory has DEFAULT"):
        load_body(SMALL, "V1")


@pytest.fixture
def run(tmp_path):
    def make(body, path=tmp_path / "run", **changes):
        (path / "bodies").mkdir(parents=True)
        save_file(body.module.state_dict(), path / "bodies/front.safetensors")
        digest = hashlib.sha256((path / "bodies/front.safetensors").read_bytes()).hexdigest()
        entry = {**body_record(body, "bodies/front.safetensors"), **changes}
        record = {"schema": 1, "bodies": {"front": entry}, "files": {"bodies/front.safetensors": digest}}
        (path / "run.json").write_text(json.dumps(record))
        return path

    return make


def test_run_body_is_what_was_saved(run):
    body = load_body("torchvision/resnet18", "none", seed=4, channels=2)
    body = replace(body, preprocessing=replace(body.preprocessing, crop=96))
    again = load_run_body(run(body), "front")
    assert (again.architecture, again.classifier, again.preprocessing) == (
        body.architecture,
        body.classifier,
        body.preprocessing,
    )
    state = body.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.module.state_dict().items())
    by_name = load_body(again.name)
    assert resolve_taps(by_name, [Tap()], (64, 64))[0].shape == (512,)


def test_run_body_errors(run, tmp_path):
    path = run(load_body("torchvision/squeezenet1_1", "none", seed=4))
    with pytest.raises(RunError, match=r"no body for view 'fron'. Did you mean 'front'\? It has: front"):
        load_run_body(path, "fron")
    with pytest.raises(InputError, match="a run brings its own weights"):
        load_body(f"run:{path}", "none", seed=1)
    with pytest.raises(MissingFileError, match="no run there"):
        load_body(f"run:{tmp_path / 'nowhere'}")
    with (path / "bodies/front.safetensors").open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(RunError, match=r"bodies/front.safetensors has changed since the run was written"):
        load_run_body(path, "front")
    (path / "bodies/front.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"bodies/front.safetensors is missing"):
        load_run_body(path, "front")
    (path / "run.json").write_text('{"bodies": {"front": {"architecture": "torchvision/resnet18"}}}')
    with pytest.raises(RunError, match=r"record of the body for view 'front' is incomplete .'file'"):
        load_run_body(path, "front")
    (path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="holds no fine-tuned bodies"):
        load_run_body(path, "front")
    (path / "run.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        load_run_body(path, "front")


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "run.json"])
def test_a_run_reads_only_its_own_weights(run, file):
    path = run(load_body("torchvision/squeezenet1_1", "none", seed=4), file=file)
    with pytest.raises(RunError, match=r"is not a .safetensors file of the run directory"):
        load_run_body(path, "front")


def test_a_run_that_names_code_imports_nothing(run, tmp_path):
    path = run(load_body(SMALL), architecture="plugin_bodies_trap:make")
    with pytest.raises(InputError, match=r"names the factory 'plugin_bodies_trap:make' .* Nothing was imported") as e:
        load_run_body(path, "front")
    assert "--trust-factory plugin_bodies_trap:make" in str(e.value)
    assert "plugin_bodies_trap" not in sys.modules
    for architecture in ("os:system", "os:system/x", "os.path:join"):
        entry = json.loads((path / "run.json").read_text())
        entry["bodies"]["front"]["architecture"] = architecture
        (path / "run.json").write_text(json.dumps(entry))
        with pytest.raises(InputError, match=r"Nothing was imported|no body 'os:system/x'"):
            load_run_body(path, "front")


def test_a_trusted_factory_is_used(run):
    path = run(load_body(SMALL))
    body = load_run_body(path, "front", trust=[SMALL])
    assert type(body.module).__name__ == "Small"


def test_shipped_weights():
    try:
        families.shipped_path("weights/squeezenet1_1.safetensors")
    except MissingFileError:
        pytest.skip("made by the scripts of data/")
    body = load_body("torchvision/squeezenet1_1", "shipped")
    assert len(body.categories) == 1000
