"""Does joining views help? Logistic heads on the embedded emoji: each view alone, fused, fused with a shuffled partner.

Extracts the emoji into a store (or uses the one given), then for each seed divides the groups anew, fits on training
rows and measures accuracy on test rows. `shuffled` gives each sample the second view of another one. Prints JSON.

    python benchmarks/emoji_views.py --store /tmp/emoji --seeds 5
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from featurecache.config import ExtractConfig, SplitConfig
from featurecache.data.shipped import shipped_path
from featurecache.data.splits import make_splits
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset
from featurecache.demo import BODY
from featurecache.extract import extract
from featurecache.features import ArrayFeatures
from featurecache.heads.base import Fold, get_head

VIEWS = ("google", "twitter")


def accuracy(
    features: ArrayFeatures, target: Target, splits: np.ndarray, settings: dict[str, float], seed: int
) -> float:
    """Test accuracy of a logistic head fitted on the training rows."""
    folds = {}
    for name in ("train", "valid", "test"):
        rows = np.flatnonzero(splits == name)
        folds[name] = Fold(features, rows, target.subset(rows))
    head = get_head("logistic")(settings, seed=seed).fit(folds["train"], folds["valid"])
    test = folds["test"]
    return float((head.predict(features[test.rows]) == test.target.values).mean())


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--C", type=float, default=0.01)
    options = parser.parse_args()
    views = {view: view for view in VIEWS}
    manifest = shipped_path("emoji/manifest.csv")
    extract(
        ExtractConfig.create({"manifest": manifest, "store": options.store, "name": "emoji", "views": views, **BODY})
    )
    found: dict[str, list[float]] = {name: [] for name in (*VIEWS, "fused", "shuffled")}
    both = FeatureDataset(options.store, dataset="emoji", target="category", views=VIEWS)
    x, _ = both.numpy()
    first, second = both.blocks
    for seed in range(options.seeds):
        splits = make_splits(both.table, both.target, SplitConfig(seed=seed), content=both.content)
        order = np.random.default_rng(seed).permutation(len(both))
        shuffled = np.concatenate([x[:, : first.stop], x[order][:, second.start :]], axis=1)
        for name in VIEWS:
            alone = FeatureDataset(options.store, dataset="emoji", target="category", views=(name,))
            features = ArrayFeatures(alone.numpy()[0], alone.blocks)
            found[name].append(accuracy(features, both.target, splits, {"C": options.C}, seed))
        for name, values in (("fused", x), ("shuffled", shuffled)):
            found[name].append(
                accuracy(ArrayFeatures(values, both.blocks), both.target, splits, {"C": options.C}, seed)
            )
    means = {name: round(float(np.mean(values)), 4) for name, values in found.items()}
    better = max(VIEWS, key=lambda name: means[name])
    print(
        json.dumps(
            {
                "samples": len(both),
                "seeds": options.seeds,
                "C": options.C,
                "mean_accuracy": means,
                "accuracy": {name: [round(value, 4) for value in values] for name, values in found.items()},
                "baseline": better,
                "ratio_fused": round(means["fused"] / means[better], 4),
                "ratio_shuffled": round(means["shuffled"] / means[better], 4),
            }
        )
    )


if __name__ == "__main__":
    main()
