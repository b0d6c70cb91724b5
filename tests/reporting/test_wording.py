"""Sentences on how a run was measured."""

from __future__ import annotations

from featurecache.reporting.wording import how_measured


def test_calibration_is_told_with_where_it_flatters_and_where_it_stopped():
    said = how_measured({"calibration": {"method": "isotonic", "bound_reached": False}})
    assert said == [
        "Probabilities are calibrated by isotonic regression, fitted on the validation samples only, whose own figures "
        "therefore say too much."
    ]
    folds = {"cv": {"folds": 5}, "calibration": {"method": "temperature", "bound_reached": True}}
    assert how_measured(folds)[1:] == [
        "Probabilities are calibrated by temperature scaling, fitted on each fold's validation samples only.",
        "The temperature stopped at an end of the range searched: the validation samples are too few, or too easy, to "
        "tell how sure to be.",
    ]
