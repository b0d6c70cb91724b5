"""A body with its own classifier, as it comes: class names and probabilities of single images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from featurecache.bodies.engines import resolve_device
from featurecache.bodies.registry import load_body
from featurecache.data.preprocessing import stack
from featurecache.data.readers import get_reader
from featurecache.data.readers.base import ReadFailure, read
from featurecache.errors import InputError

BATCH = 32


def classify(
    files: Sequence[Path], *, body: str, weights: str = "DEFAULT", top: int = 5, device: str = "auto"
) -> list[dict[str, Any]]:
    """The likeliest classes of images, with the body's own classifier and preprocessing, in float32.

    Args:
        files: images.
        body: a name that comes with a classifier.
        weights: as for `extract`.
        top: classes per image.
        device: where the body runs.

    Returns:
        Per file `{"file": name, "classes": [[class, probability], ...]}`, or `{"file": name, "error": reason}`.

    Raises:
        InputError: the body has no class names, or gives something else than scores for them.
    """
    found = load_body(body, weights)
    if found.categories is None:
        raise InputError(f"body {body!r} with weights {weights} does not know the names of its classes")
    reader = get_reader("image", channels=found.preprocessing.channels)
    where = resolve_device(device)
    module = found.module.to(where)
    results: list[dict[str, Any]] = []
    scores: Iterator[torch.Tensor]
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        decoded = [read(reader, file.read_bytes(), {}) for file in part]
        images = [found.preprocessing.apply(item) for item in decoded if not isinstance(item, ReadFailure)]
        scores = iter(())
        if images:
            with torch.inference_mode():
                logits = module(found.preprocessing.normalise(stack(images).to(where)))
            if logits.ndim != 2 or logits.shape[1] != len(found.categories):
                raise InputError(f"body {body!r} gives {tuple(logits.shape)}, not a score for each of its classes")
            scores = iter(logits.float().softmax(dim=1).cpu())
        for file, item in zip(part, decoded, strict=True):
            if isinstance(item, ReadFailure):
                results.append({"file": file.name, "error": item.message})
                continue
            best = next(scores).topk(min(top, len(found.categories)))
            named = [found.categories[place] for place in best.indices.tolist()]
            classes = [[name, round(value, 6)] for name, value in zip(named, best.values.tolist(), strict=True)]
            results.append({"file": file.name, "classes": classes})
    return results
