"""What several taps cost beside one, and what an early tap saves, since the forward ends after the last one asked for.

    python benchmarks/taps.py --model resnet18 --engine torch

Prints one JSON object: `ratio_several`, processor time for pooled taps after every stage over that for the last alone,
and `ratio_early`, for the first stage alone over the last; `..._wall` on the wall. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it, before torch is loaded

import torch

from featurecache.bodies.engines import Engine, make_engine
from featurecache.bodies.registry import load_body
from featurecache.bodies.taps import Tapped, resolve_taps
from featurecache.config import Tap

STAGES = {
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "resnet50": ("layer1", "layer2", "layer3", "layer4"),
    "densenet121": ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features.denseblock4"),
    "mobilenet_v3_small": ("features.1", "features.3", "features.8", "features.12"),
}


def seconds(engine: Engine, batch: torch.Tensor, times: int) -> tuple[float, float]:
    """(wall, processor) for so many batches."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        engine(batch)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=tuple(STAGES))
    parser.add_argument("--engine", default="torch", choices=("torch", "openvino"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4, help="per round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    body = load_body(f"torchvision/{options.model}", "none", seed=0)
    preprocessing, stages = body.preprocessing, STAGES[options.model]
    size = preprocessing.size()
    assert size is not None
    engines = {
        name: make_engine(
            Tapped(body, resolve_taps(body, [Tap.create({"module": stage, "pool": "avg"}) for stage in taps], size)),
            preprocessing,
            engine=options.engine,
            precision=options.precision,
        )
        for name, taps in {"early": stages[:1], "last": stages[-1:], "several": stages}.items()
    }
    batch = torch.randint(0, 256, (options.batch_size, *size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for engine in engines.values():
        engine(batch)
    rounds = [
        {name: seconds(engine, batch, options.batches) for name, engine in engines.items()}
        for _ in range(options.rounds)
    ]

    def ratio(name: str, clock: int) -> float:
        return round(statistics.median(entry[name][clock] / entry["last"][clock] for entry in rounds), 3)

    print(
        json.dumps(
            {
                "model": options.model,
                "engine": options.engine,
                "precision": options.precision,
                "taps": len(stages),
                "ratio_several": ratio("several", 1),
                "ratio_several_wall": ratio("several", 0),
                "ratio_early": ratio("early", 1),
                "ratio_early_wall": ratio("early", 0),
            }
        )
    )


if __name__ == "__main__":
    main()
