"""What signals do to commands, in this process: noted by those that show, the end of those that run on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from soppu.commands import until_told as module
from soppu.commands.listening import listening
from soppu.commands.until_told import until_told

BOTH = (signal.SIGTERM, signal.SIGINT)


class Ended(Exception):
    """In the place of an end for good, which no test would survive."""


def end(code: int) -> None:
    raise Ended(code)


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are heard in the main thread alone")
    before = {number: signal.signal(number, signal.default_int_handler) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_who_shows_a_run_notes_a_signal_and_a_second_one_ends_it(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "_exit", end)
    with listening() as told:
        assert told.number == 0
        os.kill(os.getpid(), number)
        assert (told.number, told.exit_code) == (number, code)
        with pytest.raises(Ended, match=f"^{code}$"):  # as the first one says
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Ended, match=f"^{code}$"):  # while the program ends
        os.kill(os.getpid(), signal.SIGTERM)
    assert told.exit_code == code


def test_who_was_never_told_finds_signals_as_they_were_and_ignored_ones_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with listening() as told:
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
        assert told.number == 0 and signal.getsignal(signal.SIGTERM) != signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler


def test_in_another_thread_nothing_is_changed() -> None:
    def enter() -> None:
        with listening(), until_told():
            found.append([signal.getsignal(number) for number in BOTH])

    found: list[object] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [[signal.default_int_handler] * 2]


@pytest.mark.parametrize("number", BOTH)
def test_what_runs_until_it_is_told_ends_with_0_and_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told_for_good = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: told_for_good.set() if code == 0 else None)
    monkeypatch.setattr(module, "_TIDY_SECONDS", 0.0)
    caplog.set_level("INFO")
    with pytest.raises(SystemExit) as ended, until_told():
        os.kill(os.getpid(), number)
    assert ended.value.code == 0
    assert [one.getMessage() for one in caplog.records] == [
        f"stopped by {signal.Signals(number).name} before it served"
    ]
    assert told_for_good.wait(5)  # also for who swallows the exception
    assert [signal.getsignal(one) for one in BOTH] == [signal.SIG_IGN] * 2
