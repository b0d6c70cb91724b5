import pytest
import torch


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """One thread, which is faster for tiny images, and no plots but in runs of module fixtures: half of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("featurecache.rundir.results.write_report", lambda directory, record: None)
    yield
    torch.set_num_threads(before)
