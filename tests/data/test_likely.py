import polars as pl
import pytest

from featurecache.config import ManifestConfig
from featurecache.data.likely import likely_group, likely_target


def guess(views, **columns):
    config = ManifestConfig.create({"manifest": "m.csv", "views": views})
    rows = 12
    table = {
        "sample_id": [f"s{i}" for i in range(rows)],
        **{k: [v[i % len(v)] for i in range(rows)] for k, v in columns.items()},
    }
    return likely_target(pl.DataFrame(table), config)


def test_a_column_that_is_called_so_comes_first():
    assert guess({"a": "front"}, front=["x", "y"], sex=["m", "f"], Label=[0, 1, None]) == "Label"


def test_else_the_first_with_a_few_classes_that_holds_no_images_and_divides_nothing():
    names = [f"n{i}" for i in range(12)]
    assert guess({"a": "front,back"}, front=["x", "y"], back=["x", "y"], split=["train", "test"], name=names,
                 kind=["p", "q"], more=[1, 2]) == "kind"  # fmt: skip


def test_none_where_there_is_nothing_to_tell_apart():
    assert guess({"a": "front"}, front=["x", "y"], same=[1], empty=[None, None]) == ""


def group(taken=(), **columns):
    return likely_group(pl.DataFrame(columns), taken)


PAIRS = [f"p{i // 2}" for i in range(40)]


@pytest.mark.parametrize(
    "name",
    [
        "patient",
        "patient_id",
        "PatientID",
        "Patient ID",
        "patientId",
        "anon_subject_no",
        "Participants",
        "CaseKey",
        "Patienten ID",
        "Patienten-ID",
        "Patientennummer",
        "Pat.-Nr.",
        "Patientin",
        "Probanden-Nr.",
        "ProbandenID",
        "Teilnehmer",
        "MRN",
        "id_paciente",
        "Número Paciente",
        "paziente",
        "sujet_id",
    ],
)
def test_a_column_that_is_called_after_a_patient_and_repeats(name):
    assert group(**{"site": ["x", "y"] * 20, name: PAIRS}) == name


@pytest.mark.parametrize(
    "columns",
    [
        {"patient_id": [f"p{i}" for i in range(40)]},  # a sample each
        {"patient_age": [i // 2 for i in range(40)]},
        {"patient_id": [(i // 2) / 3 for i in range(40)]},
        {"subject": ["cat", "dog", "fox", "owl"] * 10},  # classes
        {"study_name": ["north", "south"] * 20},
        {"outpatients": PAIRS},
        {"Pattern ID": PAIRS},
        {"Patientenalter": [i // 2 for i in range(40)]},
        {"Fall-Nr.": PAIRS},
        {"case": [None] * 40},
        {"site": PAIRS},
    ],
)
def test_what_is_no_group(columns):
    assert group(**columns) is None


def test_patients_go_before_their_studies_and_what_is_taken_is_left():
    assert group(study_id=PAIRS, patient_id=PAIRS) == "patient_id"
    assert group(("patient_id",), study_id=PAIRS, patient_id=PAIRS) == "study_id"
    assert group(slide_id=[f"s{i % 12}" for i in range(600)]) == "slide_id"
