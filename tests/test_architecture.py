import ast
import subprocess
import sys
from pathlib import Path

import pytest

import featurecache

ROOT = Path(featurecache.__file__).parent
MOST_LINES = 400

# A module imports only from what stands above it; so a new file must be given its place here.
# This is the layout of the design, with one departure: what draws a report stands directly below the run that it reads,
# so that a run is published together with its report.
ORDER = """
errors named amounts cli.typed cli.flags config progress machine.lean machine.interrupts machine.scout machine.scouts
rundir.record journal calls rundir.cut rundir.predictions rundir.densepredictions rundir.files run
reporting.wording reporting.plots reporting.drawn reporting.panels reporting.material reporting.card
reporting.origin reporting.measured reporting.masks reporting.evidence reporting.report reporting.overview
data.tables data.choice data.selectors data.layouts data.paths data.manifest data.targets data.dense data.splits
data.everyone data.likely
data.shipped
data.readers.base data.readers.headers data.readers.orientation data.readers.pixels data.readers.decoders
data.readers.windows
data.readers.array data.readers.image data.readers.dicom data.readers.mask data.readers.plugin data.readers.text
data.readers
data.preprocessing data.transforms
bodies.small bodies.names bodies.channels bodies.weights bodies.families bodies.registry bodies.folding bodies.surgery
bodies.sources bodies.program
bodies.pooling bodies.tapped bodies.taps bodies.shown bodies.split bodies.stem bodies.identity
bodies.engines.base bodies.engines.devices bodies.engines.trial bodies.engines.torch bodies.engines.graphs
bodies.engines.convert bodies.engines.openvino
bodies.engines
store.recipe store.files store.format store.windows store.schema
store.packed store.lookup store.index store.records store.lock
store.opening
store.tablehash store.binding store.chunks store.catalogue store.appender store.settle store.removal
store.store store.verify store.salvage store.rebuild store.repair store.contents store.compact
stageone.keys stageone.replicas stageone.viewsetup rundir.recorded upkeep.rebinding upkeep.dropping upkeep.maintenance
upkeep.forget upkeep.holdings
reporting.thumbnails
features.masks rundir.maskfiles machine.memory features.features features.rearranged features.stored features.stacked
features.stream features.pairs export dataset division
evaluation.dense evaluation.metrics evaluation.weighted evaluation.threshold evaluation.bootstrap
evaluation.verdict evaluation.calibration evaluation.subgroups evaluation.curves
fusion.base fusion.concat fusion.gated fusion.pair fusion.pooled fusion.spatial fusion
heads.record heads.fold heads.bins heads.scratch heads.space heads.blas heads.base heads.importance heads.losses
heads.rows heads.epochs
heads.fcmodule heads.fc heads.decodermodule heads.decoder heads.lbfgs heads.linear_stream
heads.logistic heads.xgboost heads.contract
rundir.results rundir.flow rundir.notes rundir.mistakes rundir.densefit
joint.schedule joint.checkpoint joint.average joint.callbacks joint.model joint.images joint.mixing joint.own
joint.plan
joint.parallel joint.runner joint.dense joint.step joint.loop joint.finder joint.build joint.save joint.start
joint.samples joint.settings joint.predict joint.kinds
stageone.canary stageone.readahead stageone.producer stageone.committer stageone.survey stageone.jobs stageone.space
stageone.outcome stageone.recognise stageone.viewbars
stageone.extraction extract stageone.dryrun upkeep.recompute upkeep.checking doctor
joint.prefix joint.pairing joint.sources rundir.fitrecord joint.shown joint.finetune
fit crossval tune newsamples predict evaluate
reporting.ablate reporting.compare reporting.embedding reporting.explorefields
reporting.exploremap reporting.explorefile reporting.explore reporting.attribution reporting.heatdrawing
reporting.explain
api looking care
pipeline.makers pipeline.classify pipeline.config pipeline.state pipeline.plan pipeline.stages pipeline.pipeline
pipeline.report pipeline.call demo pipeline.initial
cli.output cli.tally cli.bars cli.progress cli.options cli.stagetwo cli.extract cli.heads
cli.jointoptions cli.joint cli.newsamples cli.predict cli.stores cli.bodies cli.maintenance
cli.compare cli.ablate cli.tune cli.report cli.export cli.explore cli.explain cli.doctor
cli.demo cli.pipeline cli.init cli
""".split()


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def trees() -> dict[str, ast.Module]:
    """Every module that holds more than a docstring; the top `__init__` only hands on names, lazily."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name != "__init__.py" or (name_of(path) and len(tree.body) > 1):
            found[name_of(path)] = tree
    return found


def imports(tree: ast.Module) -> set[str]:
    """All imported names, those inside functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import on line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


TREES = trees()


def internal(tree: ast.Module) -> set[str]:
    """The modules of featurecache that are imported."""
    found = set()
    for name in imports(tree):
        if name.startswith("featurecache."):
            inner = name.removeprefix("featurecache.")
            found.add(inner if inner in TREES else inner.rpartition(".")[0] or inner)
    return found


def upward(trees: dict[str, ast.Module], order: list[str]) -> list[str]:
    """Imports of what does not stand above; with a place for every module there can be no cycle without one."""
    place = {name: number for number, name in enumerate(order)}
    return [
        f"{name} imports {other}"
        for name, tree in trees.items()
        for other in sorted(internal(tree))
        if place.get(other, -1) >= place.get(name, len(order))
    ]


def test_every_module_has_its_place():
    assert len(ORDER) == len(set(ORDER))
    assert sorted(set(TREES) - set(ORDER)) == [], "give the new module its place in ORDER"
    assert sorted(set(ORDER) - set(TREES)) == [], "no such module any more"


def test_imports_point_upward_only():
    assert upward(TREES, ORDER) == []


def test_the_check_sees_upward_edges():
    late = ast.parse("def f():\n    from featurecache import run\n    from featurecache.errors import InputError\n")
    assert upward({"config": late, "run": ast.parse("")}, ["errors", "config", "run"]) == ["config imports run"]


@pytest.mark.parametrize("name", TREES)
def test_docstring_and_length(name):
    tree = TREES[name]
    docstring = ast.get_docstring(tree) or ""
    assert docstring, f"{name} has no docstring that says what it is for"
    path = ROOT / Path(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES or "long because" in docstring, f"{name} has {lines} lines; its docstring must say why"


def test_package_docstrings():
    for path in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


@pytest.mark.parametrize(
    ("part", "banned"),
    [("store.", {"torch", "torchvision"}), ("heads.", {"zarr"}), ("", {"click", "dill", "joblib", "cloudpickle"})],
)
def test_parts_that_must_not_know_each_other(part, banned):
    for name, tree in TREES.items():
        if name.startswith(part):
            assert not {other.split(".")[0] for other in imports(tree)} & banned, name


def test_nothing_is_unpickled():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
                assert node.attr == "UnpicklingError", f"{name} uses pickle.{node.attr}"
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert [alias.name for alias in node.names] == ["UnpicklingError"], name


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import featurecache", "torch sklearn xgboost matplotlib zarr polars"),
        ("import featurecache.run, featurecache.config", "torch sklearn matplotlib"),
        ("import featurecache.data.manifest, featurecache.data.splits", "torch sklearn matplotlib"),
        ("import featurecache.store.store", "torch sklearn matplotlib"),
        ("import featurecache.heads.base", "zarr"),
    ],
)
def test_light_imports(code, banned):
    check = f"{code}\nimport sys\nassert not (found := set({banned.split()!r}) & set(sys.modules)), found"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_light():
    code = """
import sys
sys.argv = ["featurecache", "--help"]
from featurecache.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
found = {"torch", "sklearn", "xgboost", "matplotlib", "zarr", "polars", "openvino"} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "extract" in done.stdout
