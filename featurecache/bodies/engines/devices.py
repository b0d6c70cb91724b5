"""Which device runs a body, and which precision it runs fast."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from featurecache.errors import InputError

PRECISIONS = ("fp32", "bf16", "fp16")


def resolve_device(text: str | torch.device = "auto") -> torch.device:
    """`auto` (CUDA, else MPS, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps` as a device that is really there.

    Raises:
        InputError: no such device; says what there is. Never falls back to the CPU silently.
    """
    cuda, mps = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    if str(text) == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    available = ["cpu", *(f"cuda:{index}" for index in range(cuda)), *(["mps"] if mps else [])]
    here = f"Available here: {', '.join(available)}."
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InputError(f"device {str(text)!r}: not a device. Use auto, cpu, cuda, cuda:N or mps. {here}") from None
    named = f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
    if named not in available:
        raise InputError(f"device {str(text)!r}: there is none on this machine. {here}")
    return device


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX); elsewhere it is slower than fp32."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # not in older releases
    if ask is not None:
        capabilities: Mapping[str, object] = ask()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def fast_precision(device: torch.device) -> str:
    """The precision that a device runs fastest at features of use: a rule, never a timing."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` or a given precision as one that the device can run.

    Raises:
        InputError: unknown, or fp16 on a CPU, where convolutions lack it.
    """
    if precision == "auto":
        return fast_precision(device)
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: use auto, {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type == "cpu":
        raise InputError("precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    return precision
