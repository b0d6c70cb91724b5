"""The OpenVINO engine: CPUs only, where it outruns torch; uint8 pixels are normalised inside the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featurecache.bodies.engines.base import Features
from featurecache.bodies.engines.convert import core, import_openvino, load_graph
from featurecache.bodies.engines.devices import resolve_device
from featurecache.bodies.identity import Identity
from featurecache.bodies.tapped import Tapped
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError

HINTS = {"fp32": "f32", "bf16": "bf16"}
NAMES = {"float32": "fp32", "f32": "fp32", "bfloat16": "bf16", "bf16": "bf16"}


def effective_precision(compiled: Any) -> str:
    """What a compiled graph really computes in: OpenVINO takes fp32 where the CPU lacks what was asked for."""
    kind = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    return NAMES.get(kind, kind)


@cache
def openvino_has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU; asked of a graph of one node."""
    openvino = import_openvino()
    from openvino import opset13 as ops

    x = ops.parameter([1, 8], np.float32)
    model = openvino.Model([ops.relu(x)], [x], "probe")
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    return effective_precision(compiled) == "bf16"


def openvino_device(device: str | torch.device) -> torch.device:
    """The CPU.

    Raises:
        InputError: another device was asked for.
    """
    where = resolve_device("cpu" if str(device) == "auto" else device)
    if where.type != "cpu":
        raise InputError(f"engine openvino runs on the CPU, not on {where}. Use --device cpu, or --engine torch.")
    return where


def openvino_precision(precision: str) -> str:
    """`auto` or a given precision as one that OpenVINO really computes in here.

    Raises:
        DependencyError: openvino is not installed.
        InputError: this CPU lacks it. OpenVINO would take fp32 without a word.
    """
    if precision == "auto":
        return "bf16" if openvino_has_bf16() else "fp32"
    if precision not in HINTS:
        raise InputError(f"precision {precision!r}: engine openvino computes in auto, {' or '.join(HINTS)}")
    import_openvino()
    if precision == "bf16" and not openvino_has_bf16():
        raise InputError(
            "precision bf16: this CPU has no bfloat16 in hardware, and OpenVINO would compute in fp32 instead. "
            "Use --precision fp32, or --engine torch."
        )
    return precision


@dataclass
class _Compiled:
    """The graph compiled for one kind of batch, and its requests that are free."""

    model: Any
    free: list[Any] = field(default_factory=list)


@dataclass
class _Flight:
    """A batch on its way; the pixels are read in place, so they live until it is collected."""

    request: Any
    compiled: _Compiled
    pixels: Any


class OpenVINOEngine:
    """Runs a tapped body with OpenVINO on the CPU.

    Batches are read in place, planar or interleaved (`torch.channels_last`). Each may have a size of its own; rows do
    not depend on it. `submit` returns at once, and as many batches as there are streams are computed at a time.

    Args:
        tapped: the body with its taps; not changed, and not needed afterwards.
        preprocessing: normalises the batches, in the graph, with the same numbers as `Preprocessing.normalise`.
        precision: fp32 or bf16.
        identities: of the taps; with them the converted graph is kept for the next run.
        threads: of the CPU; None means all cores.

    Raises:
        ConversionError: the body can't be converted; see `load_graph`.
        InputError: images of no fixed size, or a CPU that lacks the precision.
    """

    name = "openvino"

    def __init__(
        self,
        tapped: Tapped,
        preprocessing: Preprocessing,
        *,
        precision: str,
        identities: Sequence[Identity] | None = None,
        threads: int | None = None,
    ) -> None:
        size = preprocessing.size()
        if size is None:
            raise InputError("engine openvino needs images of one size. Give --crop N.")
        self.precision, self.preprocessing, self.device = precision, preprocessing, torch.device("cpu")
        self._openvino = import_openvino()
        self._core = core()
        self._graph = load_graph(tapped, size, preprocessing.channels, identities)
        self._settings = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "THROUGHPUT"}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = str(threads)
        self._compiled: dict[tuple[bool, bool], _Compiled] = {}
        first = self._compile(whole=True, interleaved=True)
        self.in_flight = int(first.model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))

    def _compile(self, *, whole: bool, interleaved: bool) -> _Compiled:
        """The graph for uint8 (`whole`) or float32 pixels, planar or interleaved; compiled when first needed."""
        if (whole, interleaved) not in self._compiled:
            from openvino.preprocess import PrePostProcessor

            steps = PrePostProcessor(self._graph.clone())
            tensor, change = steps.input().tensor(), steps.input().preprocess()
            tensor.set_element_type(self._openvino.Type.u8 if whole else self._openvino.Type.f32)
            tensor.set_layout(self._openvino.Layout("NHWC" if interleaved else "NCHW"))
            steps.input().model().set_layout(self._openvino.Layout("NCHW"))
            if whole:
                change.convert_element_type(self._openvino.Type.f32).scale(255.0)
            change.mean(list(self.preprocessing.mean)).scale(list(self.preprocessing.std))
            model = self._core.compile_model(steps.build(), "CPU", self._settings)
            found = effective_precision(model)
            if found != self.precision:
                raise InputError(f"engine openvino: asked for {self.precision}, OpenVINO computes in {found} here")
            self._compiled[whole, interleaved] = _Compiled(model)
        return self._compiled[whole, interleaved]

    def submit(self, batch: Tensor) -> _Flight:
        """Start on a batch, (n, channels, height, width) uint8 or float32, not normalised; see `Engine.submit`.

        The batch must not be changed until it is collected.
        """
        pixels = batch if batch.dtype == torch.uint8 else batch.to(torch.float32)
        interleaved = not pixels.is_contiguous() and pixels.is_contiguous(memory_format=torch.channels_last)
        pixels = pixels.permute(0, 2, 3, 1) if interleaved else pixels.contiguous()
        compiled = self._compile(whole=pixels.dtype == torch.uint8, interleaved=interleaved)
        request = compiled.free.pop() if compiled.free else compiled.model.create_infer_request()
        request.set_input_tensor(self._openvino.Tensor(pixels.numpy(), shared_memory=True))
        request.start_async()
        return _Flight(request, compiled, pixels)

    def collect(self, handle: _Flight) -> Features:
        """Wait for a batch: one float32 array per tap; see `Engine.collect`."""
        request = handle.request
        request.wait()
        # The request's own memory is the next batch's.
        features = [np.array(tensor.data, dtype=np.float32, copy=True) for tensor in request.output_tensors]
        handle.compiled.free.append(request)
        return features

    def __call__(self, batch: Tensor) -> Features:
        """`submit` and `collect` at once."""
        return self.collect(self.submit(batch))
