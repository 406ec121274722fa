"""Stop where nothing is lost: the first Ctrl-C or SIGTERM asks the loop to save and end, the second kills."""

import signal
import threading
from types import FrameType
from typing import Any


class SafeStop:
    """Within the block, ``requested`` turns true at the first SIGINT or SIGTERM; handlers are put back afterwards."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "SafeStop":
        if threading.current_thread() is threading.main_thread():  # signals can be caught nowhere else
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()  # the second one is deadly

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *exc: object) -> None:
        self._restore()
