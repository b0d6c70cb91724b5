"""Reading ahead: in order, bounded, equal content once, and nothing that goes wrong ends the run."""

from __future__ import annotations

import hashlib
import threading
import time

import pytest
import torch
from extract_kit import image
from image_files import encoded

from featurecache.data.preprocessing import Preprocessing
from featurecache.data.readers import get_reader
from featurecache.data.readers.base import ReadFailure
from featurecache.errors import StoreError
from featurecache.stageone import producer
from featurecache.stageone.keys import Cell, Payload
from featurecache.stageone.producer import Claims, Clock, Seconds, produce

READER, PREPROCESSING = get_reader("image"), Preprocessing(resize=16, crop=16)
GOOD = encoded(image(0), "PNG")


def cells(n: int) -> list[Cell]:
    return [Cell(i, "file", str(i), str(i), "{}") for i in range(n)]


def load(cell: Cell) -> Payload | ReadFailure:
    """A payload of its own for each cell; every tenth is broken, the sixth can't be read."""
    if cell.index == 5:
        return ReadFailure("PermissionError", "Permission denied", False)
    data = b"broken" if cell.index % 10 == 9 else GOOD
    return Payload(data, hashlib.sha256(str(cell.index).encode()).digest(), None)


def items(n=40, known=lambda key: False, workers=3, ahead=lambda: 8, load=load, preprocessing=PREPROCESSING):
    return produce(
        cells(n), READER, preprocessing, Claims(known), workers=workers, ahead=ahead, seconds=Seconds(), load=load
    )


def test_one_item_a_cell_in_order():
    found = list(items())
    assert [item.cell.index for item in found] == list(range(40))
    failed = {item.cell.index: item.failure for item in found if item.failure}
    assert set(failed) == {5, 9, 19, 29, 39}
    assert failed[5].deterministic is False
    assert failed[9].deterministic is True
    images = [item.image for item in found if item.image is not None]
    assert len(images) == 35
    assert all(one.shape == (3, 16, 16) and one.dtype == torch.uint8 for one in images)


def test_no_more_than_asked_for_is_in_memory():
    started, lock = [0], threading.Lock()

    def counted(cell: Cell) -> Payload | ReadFailure:
        with lock:
            started[0] += 1
        return load(cell)

    generator = items(n=60, ahead=lambda: 5, load=counted)
    for taken, _ in enumerate(generator, 1):
        time.sleep(0.001)
        assert started[0] <= taken + 5


def test_equal_content_is_claimed_once():
    same = Payload(GOOD, b"k" * 32, None)
    found = list(items(n=20, load=lambda cell: same))
    assert sum(item.image is not None for item in found) == 1
    assert {item.key for item in found} == {b"k" * 32}


def test_known_content_is_not_decoded(monkeypatch):
    monkeypatch.setattr(producer, "decode", lambda *args: pytest.fail("decoded"))
    found = list(items(n=5, known=lambda key: True))
    assert all(item.image is None and item.failure is None for item in found)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("can't allocate memory"), MemoryError(), ValueError()])
def test_odd_errors_are_failures_that_are_tried_again(monkeypatch, error):
    def broken(self, decoded):
        raise error

    monkeypatch.setattr(Preprocessing, "apply", broken)
    (item,) = items(n=1)
    assert item.failure is not None
    assert item.failure.kind == type(error).__name__
    assert not item.failure.deterministic
    assert item.key is not None


def test_a_loader_that_raises_is_a_failure_and_a_damaged_store_is_not():
    def odd(cell: Cell) -> Payload | ReadFailure:
        raise LookupError

    (item,) = items(n=1, load=odd)
    assert item.failure == ReadFailure("LookupError", "LookupError", False)

    def damaged(key: bytes) -> bool:
        raise StoreError("index.sqlite: damaged")

    with pytest.raises(StoreError, match="damaged"):
        list(items(n=3, known=damaged))


def test_an_image_too_elongated_is_remembered():
    strip = encoded(image(0).resize((8000, 2)), "PNG")
    payload = Payload(strip, b"k" * 32, None)
    (item,) = items(n=1, load=lambda cell: payload, preprocessing=Preprocessing(resize=256, crop=224))
    assert item.failure is not None
    assert item.failure.deterministic
    assert "too elongated" in item.failure.message


def test_closing_early_leaves_no_thread():
    generator = items(n=1000)
    next(generator)
    generator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_seconds_and_clock():
    seconds = Seconds()
    seconds.add("read", 1.5)
    seconds.add("read", 0.25)
    assert seconds.to_json() == {
        "seconds_read": 1.75, "seconds_decode": 0.0, "seconds_compute": 0.0, "seconds_write": 0.0
    }  # fmt: skip
    clock = Clock()
    ticks = [clock.tick(2) for _ in range(7) if time.sleep(0.01) is None]
    assert ticks == [False] * 4 + [True] + [False] * 2
    assert 0.004 < clock.per_image < 0.1


def test_a_crop_does_not_keep_the_photograph():
    large = Payload(encoded(image(0, 400), "PNG"), b"k" * 32, None)
    (item,) = items(n=1, load=lambda cell: large, preprocessing=Preprocessing(resize=None, crop=16))
    assert item.image is not None
    assert item.image.untyped_storage().nbytes() == 16 * 16 * 3
