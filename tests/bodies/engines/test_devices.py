import pytest
import torch

from featurecache.bodies.engines import devices, fast_precision, resolve_device, resolve_precision
from featurecache.errors import InputError


def test_the_cpu_is_always_there():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has another device")
def test_auto_without_an_accelerator():
    assert resolve_device("auto") == torch.device("cpu")


def test_auto_prefers_cuda_then_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(InputError, match=r"device 'cuda:2': there is none .* Available here: cpu, cuda:0, cuda:1, mps"):
        resolve_device("cuda:2")


def test_a_missing_device_is_an_error_that_says_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"device 'cuda': there is none on this machine. Available here: cpu\."):
        resolve_device("cuda")
    with pytest.raises(InputError, match=r"device 'gpu': not a device. Use auto, cpu, cuda, cuda:N or mps"):
        resolve_device("gpu")


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"avx2": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_precision_follows_the_hardware(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fast_precision(torch.device("cpu")) == precision
    assert resolve_precision("auto", torch.device("cpu")) == precision


def test_older_torch_reads_cpuinfo(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert isinstance(devices.cpu_has_bf16(), bool)


def test_precisions_that_do_not_exist():
    with pytest.raises(InputError, match="precision 'int8': use auto, fp32, bf16, fp16"):
        resolve_precision("int8", torch.device("cpu"))
    with pytest.raises(InputError, match="precision fp16 needs a GPU; on a CPU use bf16 or fp32"):
        resolve_precision("fp16", torch.device("cpu"))
    assert resolve_precision("fp16", torch.device("cuda")) == "fp16"
