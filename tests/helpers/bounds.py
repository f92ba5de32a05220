"""What a test may take of time and memory."""

import resource
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

GIGABYTE = 2**30


@contextmanager
def within(seconds: float = 10, size: int = GIGABYTE):
    """The block must end in time, and may take that much more memory than there is now.

    Time is this process': beside other work the clock on the wall runs ahead of it.
    """
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + size, hard))
    clock = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - clock < seconds
