import subprocess
import sys

import pytest

from featurecache.machine import lean


def run(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_stage_one_loads_no_compiler():
    done = run("""
import sys
import featurecache.extract, featurecache.stageone.dryrun
found = {"torch._dynamo", "torch._dynamo.utils", "sympy", "sklearn", "scipy", "matplotlib", "zarr"} & set(sys.modules)
assert not found, found
import torch
assert "_dynamo" not in vars(torch)
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported is featurecache.machine.lean.is_compile_supported
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_whoever_needs_the_compiler_later_gets_the_real_one():
    done = run("""
import torch
from featurecache.machine.lean import torchvision
x, boxes = torch.rand(1, 3, 16, 16), torch.tensor([[0.0, 0, 0, 9, 9]])
eager = torchvision.ops.roi_align(x, boxes, 2)
asked = __import__("sys").modules["torchvision.ops.roi_align"].is_compile_supported("cpu")
import torch._dynamo.utils as utilities
assert asked == utilities.is_compile_supported("cpu")
assert utilities.__file__
exported = torch.export.export(torchvision.ops.RoIAlign(2, 1.0, -1).eval(), (x, boxes))
assert torch.equal(exported.module()(x, boxes), eager)
compiled = torch.compile(lambda z: torchvision.ops.roi_align(z, boxes, 2), backend="eager")
assert torch.equal(compiled(x), eager)
""")
    assert done.returncode == 0, done.stderr


def test_the_stand_in_has_one_name_and_goes_with_the_import(monkeypatch):
    for name in (lean.COMPILER, lean.UTILITIES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with lean.without_compiler():
        from torch._dynamo.utils import is_compile_supported

        assert is_compile_supported is lean.is_compile_supported
        with pytest.raises(ImportError, match="counters"):  # then torchvision is imported plainly
            from torch._dynamo.utils import counters  # noqa: F401
    assert lean.UTILITIES not in sys.modules


def test_a_loaded_compiler_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, lean.COMPILER, loaded := object())
    monkeypatch.delitem(sys.modules, lean.UTILITIES, raising=False)
    with lean.without_compiler():
        assert lean.UTILITIES not in sys.modules
    assert sys.modules[lean.COMPILER] is loaded
