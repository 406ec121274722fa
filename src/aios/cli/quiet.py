"""Our own lines are enough: silence the libraries' progress bars and notes."""

import os


def quiet_libraries() -> None:
    """Also keeps every library offline unless the user said otherwise: nothing here needs a hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
