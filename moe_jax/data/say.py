"""What a person should know while text is read, on stderr."""

import contextlib
import sys
import threading
from collections.abc import Iterator


def say(line: str) -> None:
    """Prints one line on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def say_after(seconds: float, line: str, enabled: bool = True) -> Iterator[None]:
    """Says `line` where what is inside takes longer than `seconds`."""
    timer = threading.Timer(seconds, say, [line])
    timer.daemon = True
    if enabled:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
