import subprocess
import sys

import timm
import torchvision

from featurecache.bodies import names


def test_names_read_from_the_source_are_the_libraries_own():
    assert sorted(names._registered("torchvision")) == torchvision.models.list_models(module=torchvision.models)
    assert sorted(names._registered("timm"), key=names._natural) == timm.list_models()


def test_without_source_the_library_itself_is_asked(monkeypatch):
    monkeypatch.setattr(names, "_registered", lambda package: frozenset())
    assert "densenet121" in names.torchvision_names()
    assert "densenet121" in names.timm_names()


def test_listing_bodies_imports_no_library():
    code = """
import sys
sys.argv = ["featurecache", "bodies", "list", "densenet121"]
from featurecache.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
found = {"torch", "torchvision", "timm"} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"torchvision/densenet121", "timm/densenet121"} <= set(done.stdout.split())
