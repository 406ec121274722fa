"""Silence the progress bars and notes of libraries; our own lines are enough."""

import importlib
import os
import sys
from typing import Any


def quiet_libraries() -> None:
    """Keep libraries silent, and offline unless the user said otherwise: nothing here needs a hub. Imports nothing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:  # it has read the environment already
        logging: Any = importlib.import_module("transformers.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
