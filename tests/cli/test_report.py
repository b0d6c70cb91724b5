import json

import pytest
from stage_two import command, hashes, quick, write_store

from featurecache.dataset import FeatureDataset
from featurecache.fit import fit_head


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    store = write_store(folder, 60)
    with quick():
        dataset = FeatureDataset(store, dataset="m", target="label")
        return fit_head(dataset, head="logistic", out=folder / "run", bootstrap=0).path


def test_what_a_person_states_is_kept_and_shown(run, tmp_path):
    before = hashes(run)
    about = tmp_path / "about.toml"
    about.write_text('intended_use = "Triage, never alone <b>!</b>"\n')
    done = command("report", run, "--about", about, "--json")
    assert done.status == 0, done.err
    assert done.json["outputs"] == [str(run / "report.html")]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Triage, never alone &lt;b&gt;!&lt;/b&gt;" in page
    assert page.count("not stated") == 9
    after = hashes(run)
    changed = {name for name in after if after[name] != before.get(name) and not name.startswith("runs/")}
    assert changed == {"about.toml", "report.html", "summary.md"}
    about.write_text('intended_uze = "x"\n')
    wrong = command("report", run, "--about", about)
    assert wrong.status == 2
    assert "Did you mean 'intended_use'" in wrong.err
    assert command("report", run, "--images", "some").status == 2


def test_fit_head_takes_it_too(run, tmp_path):
    about = tmp_path / "about.toml"
    about.write_text('data_source = "One hospital"\n')
    store = run.parent / "store"
    with quick():
        done = command("fit-head", store, "--dataset", "m", "--target", "label", "--head", "logistic", "--out",
                       tmp_path / "run", "--about", about, "--bootstrap", 0, "--images", "none")  # fmt: skip
    assert done.status == 0, done.err
    assert "- **Data source and place**: One hospital" in (tmp_path / "run/README.md").read_text()
    assert "- **Intended use**: More information needed" in (tmp_path / "run/README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "run/run.json").read_text()
    assert "about.toml" not in json.loads((tmp_path / "run/run.json").read_text())["files"], "a person may complete it"
