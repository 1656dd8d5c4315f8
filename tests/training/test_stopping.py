"""The agreement on the last step: each process stops after the same one, whatever the order of events."""

import threading
import time

import pytest

from edgespeech.training.distributed import Board
from edgespeech.training.stopping import Stopped, Stopper
from tests.support.waiting import PATIENCE


def stoppers(count):
    board = Board()
    return [Stopper(board, index, count) for index in range(count)]


def run_steps(stopper, number):
    for _ in range(number):
        assert not stopper.stop_here()
        stopper.unsaved()


def test_nobody_asks():
    [stopper] = stoppers(1)
    run_steps(stopper, 5)
    stopper.look()
    run_steps(stopper, 5)
    stopper.saved()
    assert not stopper.at_once


def test_alone_within_training_stops_before_the_next_step():
    [stopper] = stoppers(1)
    run_steps(stopper, 3)
    stopper.request("signal")
    stopper.look()
    assert stopper.stop_here()
    assert not stopper.at_once
    with pytest.raises(Stopped) as stopped:
        stopper.saved()
    assert stopped.value.code == 0


def test_alone_outside_of_training_or_before_its_first_step_stops_at_once():
    for steps in (0, 3):
        [stopper] = stoppers(1)
        run_steps(stopper, steps)
        if steps:
            stopper.saved()
        stopper.request("signal")
        stopper.look()
        assert stopper.at_once


def test_asked_in_the_last_step_of_a_stage_stops_when_that_is_saved():
    [stopper] = stoppers(1)
    run_steps(stopper, 3)
    stopper.request("signal")
    stopper.look()
    with pytest.raises(Stopped):
        stopper.saved()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_all_go_on_to_the_step_of_the_one_ahead(order):
    group = stoppers(3)
    for stopper, number in zip(group, (4, 5, 4), strict=True):
        run_steps(stopper, number)
    group[0].request("signal")
    for index in order:
        group[index].look()
    for stopper in group:
        stopper.look()
    # The second has begun five: the others begin a fifth and no sixth.
    for stopper, more in zip(group, (1, 0, 1), strict=True):
        run_steps(stopper, more)
        assert stopper.stop_here()
        assert not stopper.at_once
        with pytest.raises(Stopped):
            stopper.saved()


def test_one_without_an_unsaved_step_ends_all_at_once():
    group = stoppers(2)
    run_steps(group[0], 1)
    group[0].request("signal")
    for stopper in (*group, *group):
        stopper.look()
    assert all(stopper.at_once for stopper in group)
    # What the second has begun since then cannot end.
    with pytest.raises(Stopped):
        group[1].unsaved()


def test_no_step_is_begun_between_answer_and_decision():
    group = stoppers(2)
    for stopper in group:
        run_steps(stopper, 2)
    group[1].request("signal")
    group[0].look()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(group[0].stop_here()))
    waiting.start()
    time.sleep(0.05)
    assert not answers
    run_steps(group[1], 1)
    group[1].look()
    group[0].look()
    waiting.join(PATIENCE)
    assert answers == [False]  # the third step, which the other has begun
    assert group[0].stop_here()
    assert group[1].stop_here()
