import signal
import subprocess
import sys
import threading

import pytest

from featurecache.machine import interrupts
from featurecache.machine.interrupts import Interrupted, held_back, interrupt_once


def test_the_second_signal_breaks_nothing(capfd):
    handle = interrupt_once()
    with pytest.raises(KeyboardInterrupt):
        handle(signal.SIGINT, None)
    for _ in range(3):
        handle(signal.SIGTERM, None)
    assert capfd.readouterr().err == interrupts.ENDING, "said once"


def test_what_hangs_is_ended_after_a_while():
    code = (
        "import signal, time\nfrom featurecache.machine import interrupts\ninterrupts.PATIENCE = 0.01\n"
        "handle = interrupts.interrupt_once()\n"
        "try:\n    handle(2, None)\nexcept KeyboardInterrupt:\n    time.sleep(0.05)\n    handle(2, None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, interrupts.ENDED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end(number):
    def stop(signum, frame):
        raise KeyboardInterrupt(signum)

    def work():
        with held_back() as held:
            held.check()
            signal.raise_signal(number)
            done.append(held.caught)
            with pytest.raises(Interrupted):
                held.check()
            raise RuntimeError("what came of it")

    before, done = signal.signal(number, stop), []
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            work()
        assert caught.value.args == (number,)
        assert done == [number]
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


def test_without_a_signal_errors_pass_as_they_are():
    before = signal.getsignal(signal.SIGINT)

    def work():
        with held_back():
            assert signal.getsignal(signal.SIGINT) is not before
            raise RuntimeError("as it is")

    with pytest.raises(RuntimeError, match="as it is"):
        work()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_python_does_not_handle_and_other_threads_are_left_alone():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with held_back() as held:
            signal.raise_signal(signal.SIGTERM)
        assert held.caught is None
        seen = []

        def work():
            with held_back() as held:
                seen.append(held.caught)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [None]
    finally:
        signal.signal(signal.SIGTERM, before)
