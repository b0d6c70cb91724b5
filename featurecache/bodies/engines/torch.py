"""The torch engine: any device; low precision means the whole module, folded, in channels-last layout."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featurecache.bodies.engines.base import Features
from featurecache.bodies.folding import fold_batchnorm
from featurecache.bodies.tapped import INPUT, OUTPUT, Tapped
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FOLD_TOLERANCE = 1e-3  # of the largest activation; folding in fp32 changes about 1e-6 of it


@dataclass
class _Flight:
    """A batch on its way: outputs (on the host once `done` has passed) and what must live until then."""

    outputs: tuple[Tensor, ...]
    done: Any = None
    source: Tensor | None = None


class TorchEngine:
    """Runs a tapped body with torch.

    fp32 is the module as it is. bf16 and fp16 convert a copy: convolutions and norms folded, parameters in that
    precision, channels-last; the input is normalised in fp32 before, the outputs are fp32 again.

    Which norms can be folded depends on the taps: none is folded across a tapped module. So in bf16 and fp16 a tap
    differs slightly, by the rounding of that precision, according to the taps that it is computed together with. That
    is within the tolerance of the canary, and such rows count as the same features. In fp32 nothing is folded.

    Args:
        tapped: the body with its taps; not changed.
        preprocessing: normalises the batches.
        precision: fp32, bf16 or fp16.
        device: where it runs.
    """

    name = "torch"

    def __init__(self, tapped: Tapped, preprocessing: Preprocessing, *, precision: str, device: torch.device) -> None:
        self.precision, self.device, self.preprocessing = precision, device, preprocessing
        self.dtype = DTYPES[precision]
        self.layout = torch.contiguous_format if precision == "fp32" else torch.channels_last
        self.tapped = self._prepare(tapped).to(device)
        self.streams = _streams(device)
        self.in_flight = 2 if self.streams else 1

    def _prepare(self, tapped: Tapped) -> Tapped:
        if self.precision == "fp32":
            module = tapped.module if self.device.type == "cpu" else copy.deepcopy(tapped.module)
            return tapped.with_module(module).eval() if self.device.type != "cpu" else tapped
        keep = [tap.module for tap in tapped.taps if tap.on in (INPUT, OUTPUT)]
        folded = fold_batchnorm(tapped.module, keep)
        if not self._agrees(tapped, tapped.with_module(folded)):
            folded = copy.deepcopy(tapped.module)
        return tapped.with_module(folded.to(self.dtype).to(memory_format=torch.channels_last)).eval()

    @torch.no_grad()
    def _agrees(self, tapped: Tapped, folded: Tapped) -> bool:
        """Whether folding left the features as they were: torch.fx may see another path than a body really takes."""
        size = self.preprocessing.size()
        if size is None:
            return True
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, self.preprocessing.channels, *size, generator=generator)
        own = next(tapped.parameters(), x)
        pairs = zip(tapped(x.to(own)), folded(x.to(own)), strict=True)
        return all(float((a - b).abs().max()) <= FOLD_TOLERANCE * max(1.0, float(a.abs().max())) for a, b in pairs)

    @torch.inference_mode()
    def submit(self, batch: Tensor) -> _Flight:
        """Start on a batch, (n, channels, height, width) uint8 or float32, not normalised; see `Engine.submit`."""
        if self.streams:
            return self._submit_cuda(batch)
        return _Flight(self._run(batch.to(self.device)))

    def _run(self, batch: Tensor) -> tuple[Tensor, ...]:
        x = self.preprocessing.normalise(batch, self.layout).to(dtype=self.dtype, memory_format=self.layout)
        try:
            with _full_fp32() if self.device.type == "cuda" and self.precision == "fp32" else nullcontext():
                outputs: tuple[Tensor, ...] = self.tapped(x)
        except RuntimeError as error:
            if self.precision == "fp32" or "out of memory" in str(error):
                raise
            raise InputError(
                f"this body can't run as a whole in {self.precision} ({str(error).splitlines()[0]}). "
                "Use --precision fp32."
            ) from error
        return outputs

    def _submit_cuda(self, batch: Tensor) -> _Flight:
        """Copies in and out on streams of their own, so that they overlap with the computation of other batches."""
        inward, outward = self.streams
        compute = torch.cuda.current_stream(self.device)
        source = batch if batch.is_pinned() else batch.pin_memory()
        with torch.cuda.stream(inward):
            x = source.to(self.device, non_blocking=True)
        compute.wait_stream(inward)
        x.record_stream(compute)
        results = self._run(x)
        outward.wait_stream(compute)
        with torch.cuda.stream(outward):
            outputs = []
            for result in results:
                result.record_stream(outward)
                host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
                outputs.append(host.copy_(result, non_blocking=True))
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(outward)
        return _Flight(tuple(outputs), done, source)

    def collect(self, handle: _Flight) -> Features:
        """Wait for a batch: one float32 array per tap; see `Engine.collect`."""
        if handle.done is not None:
            handle.done.synchronize()
            # The pinned buffer goes back to torch's pool; what is kept longer must not hold on to it.
            return [np.array(output.numpy(), copy=True) for output in handle.outputs]
        return [np.ascontiguousarray(output.cpu().numpy(), dtype=np.float32) for output in handle.outputs]

    def __call__(self, batch: Tensor) -> Features:
        """`submit` and `collect` at once."""
        return self.collect(self.submit(batch))


def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """For copies to the device and back; none but on CUDA."""
    if device.type != "cuda":
        return []
    return [torch.cuda.Stream(device), torch.cuda.Stream(device)]  # type: ignore[no-untyped-call]


@contextmanager
def _full_fp32() -> Iterator[None]:
    """No TF32 in convolutions and products: cuDNN uses it unless told otherwise, at 1e-3 relative error."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
