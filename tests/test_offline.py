import socket
import sys

import pytest
from extract_kit import features, run, write_images
from stage_two import TRUST, TWO, command, write_home

import featurecache as fc


class RefusedSocketError(Exception):
    """Raised by every attempt to reach something."""


@pytest.fixture
def refused(monkeypatch):
    """Every attempt to reach something, in any thread; none may be made, not even one whose failure is passed over."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise RefusedSocketError(args)

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(RefusedSocketError):
        socket.create_connection(("192.0.2.1", 80))
    attempts.clear()
    return attempts


def test_nothing_is_sent_anywhere(tmp_path, refused):
    """Extract, fit, joint training, predict, report, explore and explain with every socket refused."""
    home = write_home(tmp_path, runs=("head", "joint"))
    dataset = fc.FeatureDataset(home / "cache", dataset="samples", target="label", views=list(TWO))
    for head in ("fc", "logistic", "xgboost"):
        assert fc.fit_head(dataset, head=head, out=tmp_path / head, bootstrap=10).metrics["train"]["n"] > 0
    for name in ("head", "joint"):
        report = home / "runs" / name / "report.html"
        assert "<html" in report.read_text(encoding="utf-8")
        scored = fc.predict(home / "runs" / name, home / "new/samples.csv", tmp_path / f"{name}.csv", **TRUST)
        assert len(scored.sample_ids) > 0
    factories = [word for name in TRUST["body"]["trust_factory"] for word in ("--trust-factory", name)]
    for words in (
        ("explore", home / "cache", "--dataset", "samples", "--run", home / "runs/head", "--out", tmp_path / "e.html"),
        ("explain", home / "runs/head", home / "new/samples.csv", "--samples", 1, *factories),
    ):
        done = command(*words)
        assert done.status == 0, done.err
    assert refused == []


def test_no_engine_sends_anything(tmp_path, refused):
    """OpenVINO's conversion included, whose own telemetry is masked."""
    pytest.importorskip("openvino")
    manifest = write_images(tmp_path / "data", 4)
    rows = [features_of(manifest, tmp_path / engine, engine) for engine in ("torch", "openvino")]
    for sample, row in rows[0].items():
        assert abs(rows[1][sample] - row).max() < 1e-3
    assert refused == []
    assert sys.modules["openvino_telemetry"] is None, "masked, so that its own stub serves"


def features_of(manifest, store, engine):
    assert run(manifest, store, engine=engine).computed == 4
    return features(store)
