import re
import subprocess
import sys

import pytest
import typer
from stage_two import command, installed

from featurecache import cli


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit-hed"], "Error: No such command 'fit-hed'. Did you mean 'fit-head'?\nSee: featurecache --help\n"),
        (["bodies", "shw"], "Error: No such command 'shw'. Did you mean 'show'?\nSee: featurecache bodies --help\n"),
        (
            ["extract", "m.csv", "--store", "s", "--group", "g"],
            "No such option: --group. --group belongs to fit-head, ",
        ),
        (["fit-head", "s", "--datset", "m"], "No such option: --datset. Did you mean '--dataset'?"),
        (["fit-head", "s"], "Error: Missing option '--dataset'"),
        (["extract", "m.csv", "--store", "s", "--layout", "wid"], "'--layout': 'wid' is not one of 'wide', 'long'."),
        (["fit-head", "s", "--dataset", "m", "--seed", "x"], "Invalid value for '--seed'"),
        (["predict"], "Error: Missing argument 'run'"),
    ],
)
def test_wrong_use_is_one_message_that_names_the_near_word(words, message):
    done = command(*words)
    assert done.status == 2
    assert message in done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "\u2500" not in done.err, "no boxes"


def test_wrong_use_under_json():
    done = command("fit-head", "s", "--json")
    assert done.status == 2
    assert done.json["status"] == "failed"
    assert done.json["command"] == "fit-head"
    assert "Missing option '--dataset'" in done.json["error"]


@pytest.mark.parametrize("words", [[], ["bodies"]])
def test_nothing_asked_shows_the_help(words):
    done = installed(*words)
    assert done.status == 2
    assert (done.out + done.err).count("Usage: ") == 1
    assert " list " in done.out + done.err if words else "Look after a store" in done.out + done.err


@pytest.mark.parametrize("name", [command_.name for command_ in cli.app.registered_commands])
def test_every_command_has_help_with_an_example(name):
    done = command(name, "--help")
    assert done.status == 0
    words = " ".join(done.out.split())
    assert "Example: featurecache" in words
    assert "2 wrong use or bad input; 3 done, but some samples failed" in words
    for option in ("--json", "--quiet", "--debug"):
        assert option in done.out


def test_every_option_has_help():
    def without(entry, path):
        found = [f"{path} {each.name}" for each in entry.params if not getattr(each, "help", None)]
        return found + [each for name, sub in getattr(entry, "commands", {}).items() for each in without(sub, name)]

    assert without(typer.main.get_command(cli.app), "featurecache") == []


@pytest.mark.parametrize("words", [["bodies"], ["bodies", "list"], ["bodies", "show"]])
def test_so_have_those_of_a_group(words):
    assert "Example: featurecache bodies" in " ".join(command(*words, "--help").out.split())


def test_paragraphs_of_the_help_fill_the_width():
    """Lines of a docstring are not lines of the help: at another width they would be ragged."""
    for each in cli.app.registered_commands:
        assert each.help, each.name
        for paragraph in each.help.split("\n\n"):
            assert "\n" not in paragraph, each.name
    lines = [line.strip() for line in installed("forget", "--help", COLUMNS="150").out.splitlines()]
    start = next(n for n, line in enumerate(lines) if line.startswith("Features and keys"))
    assert len(lines[start]) > 120
    assert lines[start + 2] == ""


def test_commands_stand_in_panels_in_the_order_of_use():
    out = command("--help").out
    places = [
        out.index(f"{name} ") for panel in cli.COMMANDS.values() for name, _, _ in panel for name in [f"│ {name}"]
    ]
    assert places == sorted(places)
    panels = [out.index(f"─ {panel} ─") for panel in cli.COMMANDS]
    assert panels == sorted(panels)


@pytest.mark.parametrize(
    ("words", "found"), [("featurecache fi", {"fit-head", "finetune-joint"}), ("featurecache bodies s", {"show"})]
)
def test_the_shell_completes_commands(words, found):
    done = installed(_FEATURECACHE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
    assert done.status == 0, done.err
    assert set(done.out.split()) == found


def test_version():
    done = command("--version")
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", done.out.strip()), "also in a checkout that was never installed"


def test_a_bug_is_told_without_a_traceback(monkeypatch, tmp_path):
    def broken(*words, **options):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("featurecache.store.store.FeatureStore.create_or_open", broken)
    done = command("info", tmp_path)
    assert done.status == 1
    assert done.err == (
        "Error: unexpected ZeroDivisionError: division by zero\n"
        "This is a bug in featurecache. Run the command again with --debug and report it.\n"
    )
    assert "ZeroDivisionError" in command("info", tmp_path, "--json").json["error"]
    assert "Traceback" in command("info", tmp_path, "--debug").err


def test_bad_input_has_no_traceback_but_under_debug(tmp_path):
    done = command("info", tmp_path / "none")
    assert (done.status, done.out) == (2, "")
    assert done.err == f"Error: {tmp_path}/none: no such store. `featurecache extract` makes one.\n"
    assert "Traceback" in command("info", tmp_path / "none", "--debug").err


def test_no_escape_codes_without_a_terminal():
    done = installed("fit-head", "--help", COLUMNS="100")
    assert done.status == 0
    assert "\x1b" not in done.out + done.err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['featurecache', 'fit-head', '--help']\n"
        "from featurecache.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "found = {'torch', 'polars', 'numpy', 'rich.progress', 'featurecache.config'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_before_a_command_began_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith("Interrupted before it began; run the same command again.")
