"""The OpenVINO engine against torch, its conversion, and the graphs that it keeps. Runs where openvino is installed."""

import copy
import ctypes
import gc
import importlib.util
import os
import signal
import socket
import sys

import numpy as np
import pytest
import torch
from torch import nn

from featurecache.bodies.engines import ConversionError, convert, graphs, make_engine, openvino
from featurecache.bodies.engines.trial import choose_batch_size
from featurecache.bodies.identity import identify
from featurecache.bodies.registry import load_body
from featurecache.bodies.taps import Tapped, resolve_taps
from featurecache.config import Tap
from featurecache.data.transforms import Preprocessing
from featurecache.errors import DependencyError, InputError

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

SIZE = (32, 32)
SMALL = Preprocessing(resize=32, crop=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def tapped_of(body, *names, size=SIZE):
    if isinstance(body, str):
        body = load_body(body, "none", seed=0)
    return Tapped(body, resolve_taps(body, [Tap.parse(name) for name in names or ("penultimate",)], size))


def with_module(module):
    body = load_body("plugin_bodies:maps", "none", seed=0)
    body.module = module.eval()
    return tapped_of(body)


def pixels(n, size=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def both(tapped, preprocessing=SMALL, **options):
    exact = make_engine(tapped, preprocessing, precision="fp32")
    return exact, make_engine(tapped, preprocessing, engine="openvino", precision="fp32", **options)


def close(found, expected, tolerance=2e-6):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (np.float32, b.shape)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_taps_agree_with_torch_in_any_layout_and_batch():
    taps = ("penultimate", "act#0:avgmax", "conv2:none", "act#1:rows", "conv1:gem")
    exact, engine = both(tapped_of("plugin_bodies:small", *taps))
    assert (engine.name, engine.precision, engine.device.type) == ("openvino", "fp32", "cpu")
    x = pixels(5)
    close(engine(x), exact(x))
    close(engine(x[:1]), exact(x[:1]))
    close(engine(x.to(memory_format=torch.channels_last)), exact(x))
    close(engine((x / 255).to(memory_format=torch.channels_last)), exact(x))
    close(engine((x / 255).double()), exact(x))
    close(engine(x.repeat(1, 1, 1, 2)[..., ::2].contiguous()[:, :, ::1]), exact(x.repeat(1, 1, 1, 2)[..., ::2]))


def test_normalised_as_torch_does():
    class Same(nn.Module):
        def forward(self, x):
            return x * 1.0

    body = load_body("plugin_bodies:maps", "none", seed=0)
    body.module = Same()
    tapped = tapped_of(body, "penultimate:none")
    engine = make_engine(tapped, SMALL, engine="openvino", precision="fp32")
    levels = torch.arange(256, dtype=torch.uint8).repeat(12).reshape(1, 3, 32, 32)
    for batch in (levels, levels / 255):
        np.testing.assert_allclose(engine(batch)[0], SMALL.normalise(batch).numpy(), atol=1e-6, rtol=0)


def test_rows_do_not_depend_on_the_batch():
    engine = make_engine(tapped_of("torchvision/squeezenet1_1"), SMALL, engine="openvino", precision="fp32")
    (whole,) = engine(pixels(16))
    for n in (1, 8, 13):
        (part,) = engine(pixels(16)[:n])
        np.testing.assert_allclose(part, whole[:n], rtol=1e-5, atol=1e-6)


def test_several_in_flight_collected_in_any_order():
    _, engine = both(tapped_of("plugin_bodies:small", "conv1:none", "penultimate"))
    expected = [engine(pixels(2 + seed % 2, seed=seed)) for seed in range(5)]
    handles = [engine.submit(pixels(2 + seed % 2, seed=seed)) for seed in range(5)]
    found = {seed: engine.collect(handles[seed]) for seed in (3, 0, 4, 1, 2)}
    for seed in range(5):
        for a, b in zip(found[seed], expected[seed], strict=True):
            np.testing.assert_array_equal(a, b)
    assert engine.in_flight >= 1
    assert choose_batch_size(engine, SIZE, 3, seconds=0.2) in (4, 8, 16, 32, 64)


def test_real_images_with_pretrained_weights(real_images):
    preprocessing = Preprocessing(resize=112, crop=112)
    taps = ("penultimate", "features.4:avg", "features.9:max")
    exact, engine = both(
        tapped_of(load_body("torchvision/squeezenet1_1", "shipped"), *taps, size=(112, 112)), preprocessing
    )
    for found, expected in zip(engine(real_images), exact(real_images), strict=True):
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected - expected.mean(0))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["_trace", "_export"])
def test_densenet_with_three_taps(way, monkeypatch):
    def refuse(*args):
        raise NotImplementedError(way)

    monkeypatch.setattr(convert, {"_trace": "_export", "_export": "_trace"}[way], refuse)
    preprocessing = Preprocessing(resize=96, crop=96)
    taps = ("penultimate", "features.denseblock2:avg", "features.denseblock3:none")
    exact, engine = both(tapped_of("torchvision/densenet121", *taps, size=(96, 96)), preprocessing)
    close(engine(pixels(6, 96)), exact(pixels(6, 96)), 2e-5)


def test_what_no_tap_needs_is_not_in_the_graph():
    early, late = (
        convert.convert(tapped_of("torchvision/squeezenet1_1", name), SIZE, 3)
        for name in ("features.3:avg", "penultimate")
    )
    assert len(early.get_ops()) < len(late.get_ops()) / 2


def test_exporting_serves_where_tracing_does_not():
    class BySize(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return x.mean((2, 3)) if x.shape[2] > 8 else x.amax((2, 3))  # tracing warns: it saw one side only

    exact, engine = both(with_module(BySize()))
    close(engine(pixels(3)), exact(pixels(3)))


def test_a_body_that_does_not_convert_says_why():
    with pytest.raises(
        ConversionError, match=r"OpenVINO can't run this body \(trace: .*; export: .*\)\. Use --engine torch"
    ):
        both(tapped_of("plugin_extract:breaks"))


def test_a_graph_with_other_numbers_is_refused():
    class Counts(nn.Module):
        """Gives other features at each call; a graph holds those of one."""

        def __init__(self):
            super().__init__()
            self.conv, self.calls = nn.Conv2d(3, 4, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.conv(x).mean((2, 3)) + self.calls

    with pytest.raises(ConversionError, match=r"trace: tap penultimate differs by .* from torch on 1 images"):
        both(with_module(Counts()))


def test_converting_reports_nothing(monkeypatch):
    """Sockets refused, and a telemetry that somebody else imported is not called."""
    reached = []

    class Telemetry:
        def __getattr__(self, name):
            reached.append(name)
            raise AssertionError(f"telemetry used: {name}")

    def refuse(*args, **kwargs):
        reached.append(args)
        raise OSError("refused")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    convert.import_openvino()
    assert sys.modules["openvino_telemetry"] is None
    users = [m for name, m in sys.modules.items() if name.startswith("openvino.tools.") and "tm" in vars(m)]
    assert users
    theirs = Telemetry()
    for module in users:
        monkeypatch.setattr(module, "tm", theirs)
    tapped = tapped_of("plugin_bodies:small")
    convert.convert(tapped, SIZE, 3)
    assert reached == []
    assert all(module.tm is theirs for module in users)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache of its own, a body with its identities, and how often bodies were converted."""
    monkeypatch.setenv(graphs.ENVIRONMENT, str(tmp_path / "cache"))
    done = []
    real = convert.convert
    monkeypatch.setattr(convert, "convert", lambda *args: (done.append(1), real(*args))[1])
    monkeypatch.setattr(convert, "_unkept", {})

    def make(body=None, taps=("penultimate",), preprocessing=SMALL):
        body = body or load_body("plugin_extract:steady", "none", seed=0)
        size = preprocessing.size()
        tapped = tapped_of(body, *taps, size=size)
        identities = identify(body, tapped.taps, size)
        x = pixels(3, size[0])
        engine = make_engine(tapped, preprocessing, engine="openvino", precision="fp32", identities=identities)
        close(engine(x), make_engine(tapped, preprocessing, precision="fp32")(x))
        return len(done)

    return make


def test_a_graph_is_converted_once_and_never_stale(kept, monkeypatch):
    assert kept() == 1
    assert kept() == 1
    assert kept(preprocessing=Preprocessing(resize=40, crop=32)) == 1, "mean and resize are not in the graph"
    changed = load_body("plugin_extract:steady", "none", seed=0)
    changed.module.bn1.running_mean[0] += 0.01
    assert kept(changed) == 2, "one statistic"
    other = load_body("plugin_extract:steady", "none", seed=0)
    other.module.conv1.dilation = (2, 2)
    assert kept(other) == 3, "the program"
    assert kept(taps=("conv1:avg",)) == 4
    assert kept(taps=("conv1:max",)) == 5
    assert kept(taps=("conv1:max", "conv1:avg")) == 6
    assert kept(taps=("conv1:avg", "conv1:max")) == 7, "outputs have an order"
    assert kept(preprocessing=Preprocessing(resize=24, crop=24)) == 8
    monkeypatch.setattr(convert.importlib.metadata, "version", lambda name: "0.0")
    assert kept() == 9, "other libraries"


def test_a_damaged_graph_is_converted_again(kept):
    assert kept() == 1
    (entry,) = graphs.graphs_folder().iterdir()
    for count, name in enumerate(("graph.bin", "graph.xml", "graph.json"), start=2):
        data = bytearray((entry / name).read_bytes())
        data[len(data) // 2] ^= 1
        (entry / name).write_bytes(data)
        assert kept() == count, name
        assert kept() == count
    (entry / "graph.bin").unlink()
    assert kept() == 5
    assert [path.name for path in graphs.graphs_folder().iterdir()] == [entry.name]


def test_that_a_body_does_not_convert_is_remembered(kept):
    for _ in range(2):
        with pytest.raises(ConversionError, match="Use --engine torch"):
            kept(load_body("plugin_extract:breaks", "none", seed=0))
    (entry,) = graphs.graphs_folder().iterdir()
    assert [path.name for path in entry.iterdir()] == ["graph.json"]
    assert kept() == 2


@pytest.mark.parametrize("what", ["a file in its place", "no space"])
def test_a_cache_that_can_not_be_written(kept, tmp_path, monkeypatch, what):
    if what == "no space":
        monkeypatch.setattr(graphs.tempfile, "mkdtemp", lambda **options: (_ for _ in ()).throw(OSError(28, what)))
    else:
        (tmp_path / "cache").write_text("no folder")
    assert kept() == 1
    assert kept() == 1, "held by this process"


def test_the_cache_is_bounded(tmp_path):
    for age, name in enumerate(("old", "used", "new")):
        entry = tmp_path / name
        entry.mkdir()
        (entry / "graph.bin").write_bytes(bytes(1000))
        os.utime(entry, (age, age))
    os.utime(tmp_path / "used", (9, 9))
    graphs.prune(tmp_path, limit=3000)
    assert len(list(tmp_path.iterdir())) == 3
    graphs.prune(tmp_path, limit=2000)
    assert {path.name for path in tmp_path.iterdir()} == {"used", "new"}
    graphs.prune(tmp_path, keep="new", limit=10)
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


def test_where_graphs_are_kept(monkeypatch):
    monkeypatch.delenv(graphs.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/xdg")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(sys, "platform", "linux")
    assert str(graphs.graphs_folder()) == "/tmp/xdg/featurecache/graphs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(graphs.graphs_folder()) == "/home/someone/.cache/featurecache/graphs"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert str(graphs.graphs_folder()) == "/home/someone/Library/Caches/featurecache/graphs"


def test_the_body_stays_as_it_is():
    tapped = tapped_of("plugin_bodies:small")
    before = copy.deepcopy(tapped.module.state_dict())
    convert.convert(tapped, SIZE, 3)
    assert tapped.early_exit
    assert not any(module._forward_hooks for module in tapped.modules())
    assert all(torch.equal(value, before[name]) for name, value in tapped.module.state_dict().items())


def test_bf16_where_the_cpu_lacks_it_is_refused(monkeypatch):
    monkeypatch.setattr(openvino, "openvino_has_bf16", lambda: False)
    tapped = tapped_of("plugin_bodies:small")
    with pytest.raises(InputError, match="no bfloat16 in hardware, and OpenVINO would compute in fp32 instead"):
        make_engine(tapped, SMALL, engine="openvino", precision="bf16")
    assert make_engine(tapped, SMALL, engine="openvino").precision == "fp32"
    # Should the probe be wrong, what was compiled is asked itself.
    monkeypatch.setattr(openvino, "openvino_has_bf16", lambda: True)
    monkeypatch.setattr(openvino, "effective_precision", lambda compiled: "fp32")
    with pytest.raises(InputError, match="asked for bf16, OpenVINO computes in fp32 here"):
        make_engine(tapped, SMALL, engine="openvino")


@pytest.mark.skipif(not openvino.openvino_has_bf16(), reason="a CPU without bfloat16")
def test_bf16_on_real_images(real_images):
    preprocessing = Preprocessing(resize=112, crop=112)
    tapped = tapped_of(load_body("torchvision/squeezenet1_1", "shipped"), size=(112, 112))
    (exact,) = make_engine(tapped, preprocessing, precision="fp32")(real_images)
    (found,) = make_engine(tapped, preprocessing, engine="openvino", precision="bf16")(real_images)
    assert 0 < np.linalg.norm(found - exact) <= 0.02 * np.linalg.norm(exact - exact.mean(0))


def test_what_it_can_not_do_is_refused(monkeypatch):
    tapped = tapped_of("plugin_bodies:small")
    with pytest.raises(InputError, match="precision 'fp16': engine openvino computes in auto, fp32 or bf16"):
        make_engine(tapped, SMALL, engine="openvino", precision="fp16")
    with pytest.raises(InputError, match="needs images of one size"):
        make_engine(tapped, Preprocessing(crop=None), engine="openvino")
    monkeypatch.setattr(openvino, "resolve_device", lambda device: torch.device("cuda"))
    with pytest.raises(InputError, match=r"runs on the CPU, not on cuda\. Use --device cpu, or --engine torch"):
        make_engine(tapped, SMALL, engine="openvino", device="cuda")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DependencyError, match="pip install openvino, or use --engine torch"):
        make_engine(tapped, SMALL, engine="openvino", precision="fp32")


def test_threads():
    engine = make_engine(tapped_of("plugin_bodies:small"), SMALL, engine="openvino", threads=1)
    (compiled,) = engine._compiled.values()
    assert compiled.model.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads this system's structure")
def test_the_stack_of_signal_handlers_outlives_the_engines():
    """Else Ctrl-C after two engines came and went is a segmentation fault; see `convert.core`."""

    class Stack(ctypes.Structure):
        _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    def stack() -> tuple[int | None, int]:
        found = Stack()
        assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
        return found.start, found.flags

    def mapped(address: int) -> bool:
        with open("/proc/self/maps", encoding="ascii") as file:
            spans = (line.split()[0].split("-") for line in file)
            return any(int(low, 16) <= address < int(high, 16) for low, high in spans)

    names = ("conv:gem", "penultimate")
    engines = [both(tapped_of("plugin_bodies:maps", name))[1] for name in names]
    for number in range(len(engines)):  # no name may hold on to one of them
        engines[number](pixels(2))
    before = stack()
    while engines:
        del engines[0]
        gc.collect()
        assert stack() == before
    assert before[0] is None or mapped(before[0])
    heard = []
    handler = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, handler)
    assert heard == [1]
