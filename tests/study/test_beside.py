"""Inputs ahead and rows behind: in order, errors where they are taken, and a clean way out."""

import threading
import time

import pytest

from mechvlm.study.running.beside import AHEAD, Beside

BATCHES = [range(start, start + 2) for start in range(0, 8, 2)]


class Stop(Exception):
    pass


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mechvlm-")]


def test_inputs_are_made_ahead_in_order_and_each_once():
    made: list[range] = []
    with Beside(lambda batch: made.append(batch) or batch, BATCHES) as beside:
        for number, batch in enumerate(BATCHES):
            assert beside.inputs(batch) is batch
            deadline = time.monotonic() + 10
            while len(made) < min(number + 1 + AHEAD, len(BATCHES)) and time.monotonic() < deadline:
                time.sleep(0.001)  # the model reads meanwhile
            assert made == BATCHES[: number + 1 + AHEAD]
    assert not names()


def test_a_part_of_a_batch_is_made_when_it_is_asked_for():
    with Beside(list, BATCHES) as beside:
        assert beside.inputs(BATCHES[0]) == [0, 1]
        assert beside.inputs(range(1, 2)) == [1]
        assert beside.inputs(BATCHES[0]) == [0, 1], "a batch that is tried again"


def test_an_error_of_the_inputs_is_raised_where_they_are_taken():
    def prepare(batch: range) -> range:
        if batch == BATCHES[1]:
            raise Stop
        return batch

    with Beside(prepare, BATCHES) as beside:
        beside.inputs(BATCHES[0])
        with pytest.raises(Stop):
            beside.inputs(BATCHES[1])
        assert beside.inputs(BATCHES[2]) == BATCHES[2]


def test_work_is_done_in_order_beside_the_reading_thread():
    done: list[tuple[int, bool]] = []
    here = threading.current_thread()
    with Beside(list, []) as beside:
        for number in range(20):
            beside.collect(lambda number=number: done.append((number, threading.current_thread() is here)))
        beside.finish()
        assert done == [(number, False) for number in range(20)]


def test_nothing_is_done_after_work_that_failed():
    done: list[int] = []
    go = threading.Event()

    def fail() -> None:
        go.wait(10)
        raise Stop

    with Beside(list, []) as beside:
        beside.collect(fail)
        beside.collect(lambda: done.append(1))
        go.set()
        with pytest.raises(Stop):
            beside.finish()
    assert done == []


def test_an_error_of_the_reading_thread_loses_no_work_and_leaves_no_thread():
    done: list[int] = []
    prepared: list[range] = []

    def read() -> None:
        with Beside(lambda batch: prepared.append(batch), BATCHES) as beside:
            beside.collect(lambda: time.sleep(0.05))
            beside.collect(lambda: done.append(1))
            raise Stop

    with pytest.raises(Stop):
        read()
    assert done == [1]
    assert len(prepared) <= AHEAD
    assert not names()
