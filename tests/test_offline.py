import socket

import pytest
from stage_two import TRUST, TWO, write_home

import featurecache as fc


class RefusedSocketError(Exception):
    """Raised by every attempt to reach something."""


def test_nothing_is_sent_anywhere(tmp_path, monkeypatch):
    """Extract, fit, joint training, predict and report with every socket refused."""

    def refuse(*args, **kwargs):
        raise RefusedSocketError(args)

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(RefusedSocketError):
        socket.create_connection(("192.0.2.1", 80))
    home = write_home(tmp_path, runs=("head", "joint"))
    dataset = fc.FeatureDataset(home / "cache", dataset="samples", target="label", views=list(TWO))
    for head in ("fc", "xgboost"):
        assert fc.fit_head(dataset, head=head, out=tmp_path / head, bootstrap=10).metrics["train"]["n"] > 0
    for run in ("head", "joint"):
        report = home / "runs" / run / "report.html"
        assert "<html" in report.read_text(encoding="utf-8")
        scored = fc.predict(home / "runs" / run, home / "new/samples.csv", tmp_path / f"{run}.csv", **TRUST)
        assert len(scored.sample_ids) > 0
