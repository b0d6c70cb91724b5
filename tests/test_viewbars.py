import pytest
from extract_kit import BODY, write_images

from featurecache.config import ExtractConfig
from featurecache.extract import extract
from featurecache.progress import Silent


class Screen(Silent):
    """Per task its total, what is done, and the last status."""

    def __init__(self):
        self.tasks, self.ended = {}, []

    def begin(self, task, total, unit="images", *, done=0):
        self.tasks[task] = [total, done, ""]

    def advance(self, task, n=1, *, status=""):
        self.tasks[task][1] += n
        self.tasks[task][2] = status or self.tasks[task][2]

    def end(self, task):
        self.ended.append(task)


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", 5, views=("a", "b"))


def seen(data, store, **options):
    screen = Screen()
    views = {"views": {"a": "a", "b": "b"}, "body": BODY, "engine": "torch", "precision": "fp32", **options}
    extract(ExtractConfig.create({"manifest": data, "store": store, **views}), screen)
    assert screen.ended == list(screen.tasks), "each ends"
    return {task: tuple(values) for task, values in screen.tasks.items()}


def test_views_that_share_a_recipe_have_a_task_each(data, tmp_path):
    (data.parent / "b0002.png").write_bytes(b"broken")
    assert seen(data, tmp_path / "store") == {"a": (5, 5, ""), "b": (5, 5, "1 failed")}
    assert seen(data, tmp_path / "store") == {"a": (5, 5, "5 reused"), "b": (5, 5, "1 failed, 4 reused")}
    retried = seen(data, tmp_path / "store", retry_failed=True)
    assert retried == {"a": (5, 5, "5 reused"), "b": (5, 5, "1 failed, 4 reused")}


def test_equal_content_counts_as_reused_and_replicas_have_their_own(data, tmp_path):
    (data.parent / "b0001.png").write_bytes((data.parent / "b0000.png").read_bytes())
    found = seen(data, tmp_path / "store", replicas=1)
    assert {task: (total, done) for task, (total, done, _) in found.items()} == dict.fromkeys(
        ("a", "b", "a, replica 1", "b, replica 1"), (5, 5)
    )
    assert (found["a"][2], found["b"][2]) == ("", "1 reused")
