import pytest
from stage_two import command, write_store


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path, 24, missing=0.2, state={"a3.png": "failed"})


def test_info_lists_recipes_and_datasets(store):
    done = command("info", store)
    assert done.status == 0
    assert "1 content failed, torchvision/resnet18, torch fp32, penultimate@none (6,) float32" in done.out
    assert "dataset   m: 24 samples of " in done.out
    assert "            a: 23 done, 1 failed, recipe " in done.out
    found = command("info", store, "--json").json
    assert found["datasets"][0]["name"] == "m"
    assert found["outputs"] == [found["recipes"][0]["id"]]
    assert found["bytes"] > 0
    assert command("info", store, "--quiet").out == found["outputs"][0] + "\n"


def test_verify_says_sound(store):
    done = command("verify", store)
    assert done.status == 0
    assert done.out.splitlines()[-1] == "sound"
    found = command("verify", store, "--json").json
    assert (found["ok"], found["status"], found["problems"]) == (True, "done", [])
    assert found["rows"] > 40


def test_verify_names_damage_and_repairs_it(store):
    chunk = next(path for path in sorted(store.glob("features.zarr/*/penultimate@none/c.*")))
    content = bytearray(chunk.read_bytes())
    content[20] ^= 1
    chunk.write_bytes(content)
    done = command("verify", store)
    assert done.status == 1
    assert f"{chunk}: its bytes were changed" in done.out
    assert "samples s0" in done.out
    assert done.err.endswith(f"Next: featurecache verify {store} --repair\n")
    found = command("verify", store, "--json").json
    assert found["status"] == "failed"
    assert found["problems"][0]["kind"] == "chunk"
    done = command("verify", store, "--repair")
    assert done.status == 0
    assert "repaired  " in done.out
    assert " 16 dropped" in done.out
    assert command("verify", store).status == 0


def test_verify_rebuilds_the_index(store):
    rows = command("verify", store, "--json").json["rows"]
    index = store / "index.sqlite"
    content = bytearray(index.read_bytes())
    content[:100] = bytes(100)
    index.write_bytes(content)
    done = command("verify", store)
    assert done.status == 1
    assert "--rebuild-index" in done.out + done.err
    done = command("verify", store, "--rebuild-index")
    assert done.status == 0, done.err
    assert "rebuilt   " in done.out
    assert command("verify", store, "--json").json["rows"] == rows


def test_no_store(tmp_path):
    for name in ("info", "verify"):
        done = command(name, tmp_path / "none")
        assert done.status == 2
        assert "no such store" in done.err
