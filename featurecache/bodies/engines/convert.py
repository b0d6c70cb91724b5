"""A tapped body as an OpenVINO graph: converted, compared with torch once, and kept for the next run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featurecache.bodies.engines.graphs import GRAPH, find_graph, keep_failure, keep_graph
from featurecache.bodies.identity import Identity
from featurecache.bodies.tapped import Tapped
from featurecache.errors import DependencyError, InputError

VERSION = 1  # of how graphs are made: raised whenever the same body would become another graph
# Their code is not part of a body's program digest, but it shapes the graph.
LIBRARIES = ("openvino", "torch", "torchvision", "timm")
EXAMPLES = 4
TOLERANCE = 1e-4  # ||graph - torch|| / ||torch|| in fp32, per tap; correct conversions differ by about 1e-6
_TELEMETRY = "openvino_telemetry"

_unkept: dict[str, Any] = {}  # graphs of this process where the cache can't be written


class ConversionError(InputError):
    """A body can't be run by OpenVINO, or not with the same numbers."""


def import_openvino() -> Any:
    """The `openvino` package, whose converter reports nothing over the network.

    Raises:
        DependencyError: it is not installed, or broken.
    """
    if "openvino" not in sys.modules:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # its import fails, so openvino takes its own stub
    try:
        import openvino
        import openvino.frontend.pytorch
    except ImportError as error:
        raise DependencyError(
            f"engine openvino: openvino can't be imported ({error}). pip install openvino, or use --engine torch."
        ) from error
    return openvino


@contextmanager
def _silent() -> Iterator[None]:
    """No usage statistics, also where somebody imported openvino with its telemetry before; no warnings either."""
    from openvino.tools.ovc import telemetry_stub

    held = {
        module: vars(module)["tm"]
        for name, module in list(sys.modules.items())
        if name.startswith("openvino.tools.") and "tm" in vars(module)
    }
    for module in held:
        module.tm = telemetry_stub  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, telemetry in held.items():
            module.tm = telemetry  # type: ignore[attr-defined]


def core() -> Any:
    """The one OpenVINO core of this process, which lives until it ends.

    Its CPU plugin gives the calling thread another stack for signal handlers, and gives the earlier one back when the
    last graph of a core is gone. Where two cores end in another order than they began, what is given back was freed
    before: the next signal (Ctrl-C, SIGTERM, the end of a child) is then a segmentation fault. Seen in 2026.4.
    """
    return _core_of(os.getpid())


@cache
def _core_of(pid: int) -> Any:
    return import_openvino().Core()


def graph_key(tapped: Tapped, identities: Sequence[Identity], size: tuple[int, int], channels: int) -> str:
    """All that a graph depends on, as 64 hex digits: what the taps depend on, in their order, and who converts."""
    made_by = {}
    for name in LIBRARIES:
        try:
            made_by[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    described = {
        "graph": VERSION,
        "taps": [
            {**tap.parameters_for_recipe(), **own._asdict()} for tap, own in zip(tapped.taps, identities, strict=True)
        ],
        "size": list(size),
        "channels": channels,
        "libraries": made_by,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def load_graph(
    tapped: Tapped, size: tuple[int, int], channels: int, identities: Sequence[Identity] | None = None
) -> Any:
    """The body as an `openvino.Model`, from the cache where it is there.

    Args:
        tapped: the body with its taps; stays as it is.
        size: (height, width) of the images.
        channels: of the images.
        identities: what each tap depends on; without them nothing is looked up or kept.

    Returns:
        Input (n, channels, *size) float32, normalised; one float32 output a tap, (n, *tap.shape). What no tap needs is
        not in it.

    Raises:
        ConversionError: the body can't be converted, or the graph gives other numbers than torch.
        DependencyError: openvino is not installed.
    """
    openvino = import_openvino()
    if identities is None:
        return convert(tapped, size, channels)
    key = graph_key(tapped, identities, size, channels)
    if key in _unkept:
        return _unkept[key]
    found = find_graph(key)
    if isinstance(found, str):
        raise ConversionError(found)
    if found is None:
        try:
            model = convert(tapped, size, channels)
        except ConversionError as error:
            keep_failure(key, str(error))
            raise
        found = keep_graph(key, lambda folder: openvino.save_model(model, str(folder / GRAPH), compress_to_fp16=False))
        if found is None:
            return _unkept.setdefault(key, model)
    return core().read_model(str(found))  # weights are mapped, not read


def convert(tapped: Tapped, size: tuple[int, int], channels: int) -> Any:
    """Convert a body, and compare the graph with torch on fixed inputs in batches of different sizes.

    Tracing comes first, since it takes a fifth of the time of torch.export. It is trusted only where it saw nothing
    that depends on values or sizes (torch warns of that); everything else is exported.

    Raises:
        ConversionError: neither way gives the same features as torch.
    """
    openvino = import_openvino()
    whole = tapped.with_module(tapped.module).eval()
    whole.early_exit = False  # no exception may leave the pass
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, channels, *size, generator=generator)
    x *= torch.linspace(0.25, 2, EXAMPLES).reshape(-1, 1, 1, 1)  # inputs that differ in more than noise
    problems = []
    for way in (_trace, _export):
        try:
            with torch.no_grad(), _silent():
                model = way(openvino, whole, x[:2])
                model.reshape([-1, channels, *size])
                problem = _disagreement(model, tapped, x)
        except MemoryError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {_first_line(error)}"
        if not problem:
            return model
        problems.append(f"{way.__name__.removeprefix('_')}: {problem}")
    raise ConversionError(f"OpenVINO can't run this body ({'; '.join(problems)}). Use --engine torch.")


def _trace(openvino: Any, whole: Tapped, x: Tensor) -> Any:
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    warnings.filterwarnings("error", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
    traced = torch.jit.trace(whole, x, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
    # OpenVINO folds constants itself; freezing the trace before takes four times as long.
    return openvino.convert_model(TorchScriptPythonDecoder(traced, example_input=(x,), skip_freeze=True))


def _export(openvino: Any, whole: Tapped, x: Tensor) -> Any:
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=1 << 16)}}
    return openvino.convert_model(torch.export.export(whole, (x,), dynamic_shapes=batch, strict=False))


def _disagreement(model: Any, tapped: Tapped, x: Tensor) -> str:
    """What differs between graph and body, '' where nothing does."""
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for n in (1, 3):
        batch = x[-n:].contiguous()
        expected = [features.numpy() for features in tapped(batch)]
        found = list(compiled(batch.numpy()).values())
        if [a.shape for a in found] != [a.shape for a in expected]:
            return f"{n} images give the shapes {[a.shape for a in found]} instead of {[a.shape for a in expected]}"
        for tap, new, old in zip(tapped.taps, found, expected, strict=True):
            if not np.array_equal(np.isnan(new), np.isnan(old)):
                return f"tap {tap.tap} gives NaN elsewhere than torch"
            norm = float(np.linalg.norm(np.nan_to_num(old))) or 1.0
            error = float(np.linalg.norm(np.nan_to_num(new) - np.nan_to_num(old))) / norm
            if not error <= TOLERANCE:
                return f"tap {tap.tap} differs by {error:.2g} from torch on {n} images (at most {TOLERANCE:g})"
    return ""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""
