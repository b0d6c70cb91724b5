"""The first files of a project of one's own: a commented pipeline and a manifest of three rows."""

from __future__ import annotations

from pathlib import Path

from featurecache.errors import InputError

MANIFEST = """\
sample_id,front,side,label,group
s1,images/s1-front.jpg,images/s1-side.jpg,yes,p1
s2,images/s2-front.jpg,images/s2-side.jpg,no,p2
s3,images/s3-front.jpg,,yes,p3
"""

PIPELINE = """\
# A pipeline for featurecache: what is done to which samples. Check it with
#   featurecache pipeline pipeline.toml --dry-run
# and run it with
#   featurecache pipeline pipeline.toml
# What is done once is not done again; a key that is not known is refused with the nearest one.
title = "My samples"

[data]
manifest = "manifest.csv"                       # CSV or Parquet, a row per sample; relative to this file
views = { front = "front", side = "side" }      # a name for each view, and the column that holds its paths
target = ["label"]                              # what is to be predicted; several columns of 0 and 1: several findings
group = "group"                                 # what must stay on one side of the split: the patient
# id = "case"                                   # the column of the samples' names, if it is not sample_id
# root = "images"                               # what paths start from, if that is not the manifest's folder
# split = "split"                               # a column that holds train, valid and test
# uncertain = { "-1" = "ignore" }               # what a label such as -1 means: ignore, zero or one
# reader = { front = "dicom" }                  # image, dicom, array, text, mask, or package.module:function

# Stage one: a network runs over every image once, and what it sees is kept.
[extract]
body = "torchvision/squeezenet1_1"              # see: featurecache bodies list densenet
weights = "shipped"                             # DEFAULT downloads the usual ones; shipped come with featurecache
image_size = 224

# Stage two: heads on the features, seconds each.
[[fit]]
head = "logistic"
settings = { C = 0.01 }

[[fit]]
head = "fc"

# Each view alone, to see whether joining them helps.
[[fit]]
name = "front-alone"
head = "logistic"
views = ["front"]
settings = { C = 0.01 }

# Bodies and head together, from where the head "fc" stands. Takes minutes to hours; remove the # when all else runs.
# [[joint]]
# init = "fc"
# epochs = 3
# freeze_epochs = 0

# All runs beside each other: ranked on validation, told apart on test.
[compare]
"""


def write_initial(folder: Path) -> list[Path]:
    """pipeline.toml and manifest.csv in a folder, which is made.

    Raises:
        InputError: one of them is there already; nothing was written.
    """
    files = {folder / "pipeline.toml": PIPELINE, folder / "manifest.csv": MANIFEST}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, not a folder")
    for path in files:
        if path.exists():
            raise InputError(f"{path}: is there already. Nothing was written; give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)
