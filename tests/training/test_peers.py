"""Who lives and who does not, on a clock of the test's own."""

import socket

from edgespeech.training.distributed import Board
from edgespeech.training.peers import LOST, Peers

NAME = f"process 1 of 2 (on {socket.gethostname()})"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def pair(timeout=30.0):
    board, clock = Board(), Clock()
    return Peers(board, 0, 2, timeout, clock), Peers(board, 1, 2, timeout, clock), clock


def test_both_live():
    first, second, clock = pair()
    for _ in range(10):
        for peer in (first, second):
            peer.live()
            assert peer.judge() is None
        clock.now += 20.0


def test_silence_is_death_and_is_named():
    first, second, clock = pair()
    second.live()
    assert first.judge() is None
    clock.now += 29.0
    assert first.judge() is None
    clock.now += 2.0
    verdict = first.judge()
    assert verdict is not None
    assert verdict.message.startswith(f"{NAME} has given no sign of life for 31 s")
    assert "--resume" in verdict.message
    assert verdict.status == LOST


def test_one_that_never_spoke_is_dead_too():
    first, _, clock = pair()
    assert first.judge() is None
    clock.now += 31.0
    verdict = first.judge()
    assert verdict is not None
    assert verdict.message.startswith("process 1 of 2 has given no sign")


def test_one_that_is_done_may_be_silent():
    first, second, clock = pair()
    second.live()
    assert not first.all_done()
    second.end()
    assert first.judge() is None
    clock.now += 1000.0
    assert first.judge() is None
    assert first.all_done()


def test_an_error_ends_the_others_with_its_message_and_status():
    first, second, _ = pair()
    second.live()
    second.fail("--data_dir=/data is missing", 2)
    assert first.judge() == (f"{NAME} stopped: --data_dir=/data is missing", 2)
    assert first.all_done()


def test_less_patience_when_an_operation_of_all_has_failed():
    first, second, clock = pair(timeout=100.0)
    second.live()
    assert first.judge() is None
    first.hurry(5.0)
    clock.now += 6.0
    assert first.judge() is not None


def test_the_last_word_stands():
    """The thread that says "lives" may come after the one that says why the process ends."""
    first, second, clock = pair()
    second.live()
    second.fail("the disk is gone", 1)
    second.live()
    second.end()
    clock.now += 100.0
    verdict = first.judge()
    assert verdict is not None
    assert (verdict.message, verdict.status) == (f"{NAME} stopped: the disk is gone", 1)
