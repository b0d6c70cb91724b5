"""How near extraction comes to its limit, and how far it is ahead of the loop that everybody writes.

    python benchmarks/ceiling.py --model resnet18 --engine torch --precision fp32

Limit, in images/s: 1 / (t_forward + t_decode / cores). t_forward is the bare forward of that engine and precision on
preloaded tensors at its best batch size, whether this package's engine runs it or plain torch or OpenVINO does;
t_decode is the fastest decode, resize and crop of the same JPEGs, in memory, that gives the pixels of the recipe.
Extraction goes through the public API into a fresh store, commits included. The loop is ImageFolder, a DataLoader with
a worker per core, the model under no_grad, torch.cat. All are measured in turn, round after round, since machines
drift; figures are medians, ratios are medians of each round's ratio. `ratio_of_processor_time` is what forward
and decode take of the processor over what extraction takes: on a busy machine the more reliable one; it lies above
`ratio` by what cores stood idle. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it, before torch is loaded

import numpy as np
import torch
from pictures import write_jpegs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms._presets import ImageClassification

from featurecache.bodies.engines import Engine, make_engine
from featurecache.config import ExtractConfig
from featurecache.data.preprocessing import Preprocessing
from featurecache.data.transforms import resize
from featurecache.extract import extract
from featurecache.machine.scouts import cores
from featurecache.progress import Silent
from featurecache.stageone.viewsetup import ViewSetup, set_up_view
from featurecache.store.store import FeatureStore

BATCHES = (8, 16, 32, 64)
TRIAL = 32  # images, at least, for each batch size
IN_FLIGHT = 4  # batches that an engine may have at once in the bare forward


class Stopwatch(Silent):
    """From the first image that is read to the last commit, on the wall and of the processor."""

    wall = cpu = 0.0

    def begin(self, task: str, total: int | None, unit: str = "images", *, done: int = 0) -> None:
        """The engine stands, reading starts."""
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def end(self, task: str) -> None:
        """All is committed."""
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


class Cost(NamedTuple):
    """Of one image: seconds on the wall, and of the processor (of this process, children left out)."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, images: int, work: Callable[[], object]) -> Cost:
        """Do it and divide."""
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return cls((time.perf_counter() - wall) / images, (time.process_time() - cpu) / images)


def run_engine(engine: Engine, batches: list[Tensor]) -> None:
    """Batches through an engine of this package, several in flight."""
    flying: deque[Any] = deque()
    for batch in batches:
        flying.append(engine.submit(batch))
        if len(flying) >= IN_FLIGHT:
            engine.collect(flying.popleft())
    while flying:
        engine.collect(flying.popleft())


def plain_torch(module: nn.Module, precision: str) -> Callable[[list[Tensor]], None]:
    """The module as it stands, on float tensors: the better known way for each precision."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]

    def work(batches: list[Tensor]) -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            for batch in batches:
                module(batch.float().contiguous(memory_format=torch.channels_last) if dtype != torch.float32 else batch)

    return work


def plain_openvino(module: nn.Module, precision: str, side: int) -> Callable[[list[Tensor]], None]:
    """The module converted as OpenVINO's own documentation does it, in its throughput mode."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # sends nothing
    import openvino

    exported = torch.export.export(
        module, (torch.zeros(2, 3, side, side),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision]}
    compiled = openvino.Core().compile_model(openvino.convert_model(exported), "CPU", hints)

    many = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") + 1
    requests = [compiled.create_infer_request() for _ in range(many)]

    def work(batches: list[Tensor]) -> None:
        for i, batch in enumerate(batches):
            if i >= many:
                requests[i % many].wait()
            requests[i % many].start_async({0: batch.numpy()}, share_inputs=True)
        for request in requests[: len(batches)]:
            request.wait()

    return work


class Forward:
    """The bare forward: the fastest of the ways there are, at the best batch size, found once and then timed."""

    def __init__(self, setup: ViewSetup, engine: str, precision: str, seconds: float) -> None:
        self.seconds, side = seconds, setup.size[0]
        own = make_engine(setup.tapped(), setup.preprocessing, engine=engine, precision=precision)
        plain = (
            plain_torch(setup.body.module, precision)
            if engine == "torch"
            else plain_openvino(setup.body.module, precision, side)
        )
        self.rate, self.name = 0.0, ""
        for n in BATCHES:
            pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
            ways: list[tuple[str, Callable[[list[Tensor]], None], Tensor]] = [
                ("engine", lambda batches: run_engine(own, batches), pixels),
                ("plain", plain, setup.preprocessing.normalise(pixels)),
            ]
            for name, way, batch in ways:
                way([batch])  # warm up
                rate = 1 / self._timed(way, batch, max(2, TRIAL // n)).wall
                if rate > self.rate:
                    self.rate, self.name, self.work, self.batch = rate, f"{name}, batch {n}", way, batch

    @staticmethod
    def _timed(way: Callable[[list[Tensor]], None], batch: Tensor, times: int) -> Cost:
        return Cost.of(times * len(batch), lambda: way([batch] * times))

    def measure(self) -> Cost:
        """Of an image."""
        return self._timed(self.work, self.batch, max(2, round(self.seconds * self.rate / len(self.batch))))


def decode(payload: bytes, preprocessing: Preprocessing) -> Tensor:
    """The fastest way known to the pixels of the recipe: libjpeg-turbo through torchvision, resized on uint8."""
    pixels = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(payload), dtype=torch.uint8), 3, True)
    height, width = pixels.shape[1:]
    short, side = preprocessing.resize, preprocessing.crop
    assert short is not None
    assert side is not None
    long = int(short * max(height, width) / min(height, width))
    size = (short, long) if height <= width else (long, short)
    pixels = resize(pixels, size, preprocessing.interpolation, preprocessing.antialias)
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return pixels[:, top : top + side, left : left + side]


def measure_decode(payloads: list[bytes], preprocessing: Preprocessing, threads: int) -> Cost:
    """Cost of `decode` on so many threads."""
    parts = [payloads[i::threads] for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return Cost.of(
            len(payloads), lambda: list(pool.map(lambda part: [decode(p, preprocessing) for p in part], parts))
        )


def check_pixels(setup: ViewSetup, payloads: list[bytes]) -> None:
    """The decoding that the limit is made of gives the pixels of the recipe, so that no other pixels set the limit."""
    for payload in payloads:
        expected = setup.preprocessing.apply(setup.reader.decode(payload, {}))
        if not torch.equal(decode(payload, setup.preprocessing), expected):
            raise SystemExit("the decoding that sets the limit gives other pixels than the recipe")


def body_without_classifier(setup: ViewSetup) -> nn.Module:
    """What people put into the loop: the model with its last layer cut off; a model of its own."""
    module = copy.deepcopy(setup.body.module).eval()
    owner, _, name = (setup.body.classifier or "").rpartition(".")
    if name:
        setattr(module.get_submodule(owner), name, nn.Identity())
    return module


def hand_written(model: nn.Module, folder: Path, batch_size: int, transform: Any) -> Tensor:
    """The loop that everybody writes."""
    loader = DataLoader(ImageFolder(str(folder), transform), batch_size=batch_size, num_workers=cores())
    found = []
    with torch.no_grad():
        for images, _ in loader:
            found.append(model(images))
    return torch.cat(found)


def run_extract(folder: Path, options: argparse.Namespace, n: int) -> tuple[Cost, float, dict[str, float]]:
    """Of an image from the first read to the last commit; images/s with start-up; seconds by part."""
    store, watch = folder / "store", Stopwatch()
    shutil.rmtree(store, ignore_errors=True)
    summary = extract(configuration(folder, options), watch)
    assert summary.computed == n, summary
    return Cost(watch.wall / n, watch.cpu / n), summary.images_per_second, summary.seconds


def configuration(folder: Path, options: argparse.Namespace) -> ExtractConfig:
    """Stage one as a user would ask for it."""
    tuned = {key: getattr(options, key) for key in ("batch_size", "workers") if getattr(options, key) is not None}
    return ExtractConfig.create(
        {
            "manifest": folder / "images.csv", "store": folder / "store", "views": {"image": "image"},
            "body": f"torchvision/{options.model}", "weights": "none", "seed": 0, "engine": options.engine,
            "precision": options.precision, "store_dtype": "float32", "device": "cpu", **tuned,
        }
    )  # fmt: skip


def centred_error(found: np.ndarray, expected: np.ndarray) -> float:
    """||difference|| / ||x - mean||."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean(axis=0)))


def difference(folder: Path, setup: ViewSetup, model: nn.Module, payloads: list[bytes]) -> float:
    """How far what is stored lies from the plain model on the same pixels."""
    store = FeatureStore(folder / "store")
    binding = store.binding("images")
    recipe = store.recipe(binding.recipes["image"])
    cells = store.resolve(binding, "image")
    found = store.read(recipe.id, next(iter(recipe.taps)), cells.rows[: len(payloads)]).astype(np.float32)
    store.close()
    pixels = torch.stack([decode(payload, setup.preprocessing) for payload in payloads])
    with torch.no_grad():
        expected = model(setup.preprocessing.normalise(pixels))
    expected = expected.mean((2, 3)) if expected.ndim == 4 else expected
    if found.shape != expected.shape:
        return float("nan")
    return centred_error(found, expected.numpy())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="of torchvision")
    parser.add_argument("--engine", default="torch", choices=("torch", "openvino"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--images", type=int, help="per round; default: as many as take --seconds")
    parser.add_argument("--seconds", type=float, default=8.0, help="of extraction in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="of extraction; default: its own choice")
    parser.add_argument("--workers", type=int, help="of extraction; default: its own choice")
    parser.add_argument("--no-loop", action="store_true", help="leave the hand-written loop out")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    setup = set_up_view(configuration(folder, options), "image")
    forward = Forward(setup, options.engine, options.precision, options.seconds / 3)
    n = options.images or max(128, round(options.seconds * forward.rate / 64) * 64)
    write_jpegs(folder, n)
    payloads = [path.read_bytes() for path in sorted((folder / "images" / "all").iterdir())]
    plain = [payload for payload in payloads[:192] if b"Exif" not in payload[:64]]
    check_pixels(setup, plain[:32])
    model = body_without_classifier(setup)
    transform = ImageClassification(crop_size=setup.size[0], resize_size=setup.preprocessing.resize or 256)
    rounds: list[dict[str, float]] = []
    seconds: dict[str, float] = {}
    for _ in range(options.rounds):
        forward_cost = forward.measure()
        one = measure_decode(plain * 2, setup.preprocessing, 1)
        every = measure_decode(plain * 2, setup.preprocessing, cores())
        own, with_start, seconds = run_extract(folder, options, n)
        least = forward_cost.wall + one.wall / cores()
        now = {
            "forward": 1 / forward_cost.wall,
            "decode_1_thread": 1 / one.wall,
            "decode_all_cores": 1 / every.wall,
            "limit": 1 / least,
            "extract": 1 / own.wall,
            "extract_with_start": with_start,
            "ratio": least / own.wall,
            "ratio_of_processor_time": (forward_cost.cpu + one.cpu) / own.cpu,
            "cpu_ms_forward": 1e3 * forward_cost.cpu,
            "cpu_ms_decode": 1e3 * one.cpu,
            "cpu_ms_extract": 1e3 * own.cpu,
        }
        if not options.no_loop:
            loop = Cost.of(n, lambda: hand_written(model, folder / "images", 32, transform))
            now |= {"loop": 1 / loop.wall, "ratio_to_loop": loop.wall / own.wall}
        rounds.append(now)
    figures = {name: statistics.median(entry[name] for entry in rounds) for name in rounds[0]}
    return {
        "model": options.model,
        "engine": options.engine,
        "precision": options.precision,
        "images": n,
        "cores": cores(),
        **{name: round(value, 3 if name.startswith(("ratio", "cpu")) else 1) for name, value in figures.items()},
        "ratios": [round(entry["ratio"], 3) for entry in rounds],
        "forward_way": forward.name,
        "difference_to_plain_torch": difference(folder, setup, model, plain_head(payloads)),
        **seconds,
    }


def plain_head(payloads: list[bytes]) -> list[bytes]:
    """The first payloads up to the first that EXIF turns."""
    turned = next((i for i, payload in enumerate(payloads) if b"Exif" in payload[:64]), len(payloads))
    return payloads[:turned]


def main() -> None:
    """Run and print."""
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="ceiling-") as name:
        print(json.dumps(measure(options, Path(name))))


if __name__ == "__main__":
    main()
