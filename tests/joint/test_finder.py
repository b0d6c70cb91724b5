import numpy as np

from featurecache.joint.finder import Curve, smoothed, suggest

RATES = np.geomspace(1e-6, 1.0, 100)


def test_the_suggestion_lies_where_the_loss_falls_fastest_and_well_below_where_it_is_lowest():
    losses = 2 - 1.5 / (1 + np.exp(-4 * (np.log10(RATES) + 3))) + np.where(RATES > 0.1, 60 * (RATES - 0.1), 0)
    rate, smooth = suggest(RATES, losses)
    assert 1e-4 < rate < 1e-2
    assert rate <= RATES[int(np.argmin(smooth))] / 10 + 1e-12


def test_a_start_that_is_as_good_as_it_gets_is_left_alone():
    rate, _ = suggest(RATES, 1 + np.maximum(np.log10(RATES) + 6, 0))
    assert rate < 1e-6


def test_smoothing_starts_without_a_bias():
    np.testing.assert_allclose(smoothed(np.full(10, 3.0)), 3.0)
    assert abs(smoothed(np.array([0.0, 1.0]))[1] - 0.1 / 0.19) < 1e-12


def test_the_curve_is_written(tmp_path):
    losses = np.linspace(2, 1, 100)
    Curve(RATES, losses, smoothed(losses), 1e-3).write(tmp_path)
    assert (tmp_path / "lr_find.csv").read_text().startswith("lr,loss,smoothed_loss\n")
    assert (tmp_path / "lr_find.png").stat().st_size > 1000
