"""The commands' imports: no garbage is collected meanwhile, and what they made is left alone."""

import gc

import pytest

from mechvlm.cli.console import importing


@pytest.fixture(autouse=True)
def _collecting():
    gc.enable()
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_within_and_what_was_made_is_left_alone_afterwards():
    with importing():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(made)
    assert all(thing is not made for thing in gc.get_objects())


def test_an_import_that_fails_leaves_the_collector_as_it_was():
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_who_collects_nothing_is_left_so():
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()
