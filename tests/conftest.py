import gc
import signal

import pytest

# A shell that starts the tests with `&` ignores SIGINT, and so would every program that they interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="more rounds and longer loads in tests/faults, by hand")


@pytest.fixture(autouse=True)
def living_heap():
    """Undo what an inspect process does to its heap: one inside a test must not stop collection for the rest."""
    yield
    if not gc.isenabled():
        gc.unfreeze()
        gc.enable()
        gc.collect()
