import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
import typer

from featurecache.amounts import human_bytes
from featurecache.cli.output import Output, command
from featurecache.errors import InputError, StoreError


@pytest.fixture(autouse=True)
def _as_before():
    before, handlers = (
        warnings.formatwarning,
        {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)},
    )
    yield
    warnings.formatwarning = before
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(body, *, name="demo", as_json=False, quiet=False, debug=False):
    try:
        with command(name, as_json=as_json, quiet=quiet, debug=debug) as output:
            body(output)
    except typer.Exit as end:
        return end.exit_code
    return 0


def fill(output: Output) -> None:
    output.outputs = ["one", "two"]
    output.figures = {"n": 3}
    output.text("line")
    output.next = "do this"


def fail(output: Output) -> None:
    fill(output)
    output.failed = [{"sample_id": f"s{i}", "view": "a", "path": "p", "error": "bad"} for i in range(12)]


def test_text_goes_to_stdout_and_next_to_stderr(capsys):
    assert run(fill) == 0
    assert capsys.readouterr() == ("line\n", "Next: do this\n")


def test_quiet_prints_paths_alone(capsys):
    assert run(fill, quiet=True) == 0
    assert capsys.readouterr() == ("one\ntwo\n", "")


def test_json_is_one_object_on_stdout(capsys):
    assert run(fill, as_json=True) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "schema": 1, "command": "demo", "status": "done", "outputs": ["one", "two"], "failed": [], "n": 3,
    }  # fmt: skip
    assert err == ""


def test_failed_samples_give_status_3_and_the_first_are_listed(capsys):
    assert run(fail) == 3
    err = capsys.readouterr().err
    assert "failed: s0 a p: bad" in err
    assert "... and 2 more" in err
    assert run(fail, as_json=True) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "partly failed"
    assert len(found["failed"]) == 12


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("bad column"), 2, "Error: bad column\n"),
        (StoreError("broken"), 1, "Error: broken\n"),
        (
            PermissionError(13, "Permission denied", "x"),
            1,
            "Error: PermissionError: [Errno 13] Permission denied: 'x'\n",
        ),
        (KeyboardInterrupt(), 130, "Interrupted. What was complete is kept"),
        (typer.Abort(), 130, "Interrupted. What was complete is kept"),
        (KeyError("oops"), 1, "This is a bug in featurecache. Run the command again with --debug and report it."),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_errors_are_one_message_without_traceback(capsys, error, status, message, as_json):
    def body(output):
        raise error

    assert run(body, as_json=as_json) == status
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    if as_json:
        found = json.loads(out)
        assert found["status"] == ("interrupted" if status == 130 else "failed")
        assert found["error"] in err
    assert run(body, debug=True) == status
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_says_what_is_kept_and_how_to_go_on(capsys):
    def body(output, *notes):
        interrupt = KeyboardInterrupt()
        for note in notes:
            interrupt.add_note(note)
        raise interrupt

    def told(name, *notes):
        assert run(lambda output: body(output, *notes), name=name) == 130
        return capsys.readouterr().err

    again = "What was complete is kept; run the same command again to go on."
    assert told("extract") == f"Interrupted. {again}\n"
    assert told("pipeline", "with --resume") == f"Interrupted. {again}\n", "it resumes by itself"
    assert told("finetune-joint", "Give --resume.") == "Interrupted. Give --resume.\n"
    afresh = "Interrupted. What was not finished is not kept; the same command begins afresh.\n"
    assert told("fit-head") == told("finetune-joint") == afresh


def test_another_interrupt_while_python_ends_says_nothing():
    code = (
        "import os, signal, typer\nfrom featurecache.cli.output import command\n"
        "try:\n    with command('extract', as_json=False, quiet=False, debug=False):\n        os.kill(os.getpid(), 2)\n"
        "except typer.Exit:\n    os.kill(os.getpid(), 2)\n    print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "Interrupted. What was complete is kept; run the same command again to go on.\n"
    assert done.stdout == ""


def test_a_status_of_its_own(capsys):
    def body(output):
        output.status = 1

    assert run(body, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["status"] == "failed"


def test_warnings_are_one_line():
    run(fill, quiet=True)
    assert warnings.formatwarning("careful", UserWarning, "/deep/file.py", 3) == "Warning: careful\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    code = (
        "from featurecache.cli.output import command\n"
        "with command('x', as_json=False, quiet=False, debug=False) as output:\n"
        "    [output.text('line') for _ in range(100000)]\n"
    )
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    err = process.communicate()[1]
    assert "BrokenPipe" not in err


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_345_678, "2.3 MB"), (5e15, "5,000.0 TB")]
)
def test_sizes_are_human(count, text):
    assert human_bytes(count) == text
