"""Keep freed memory in the process.

glibc hands large freed blocks back to the kernel, and every training step pays page faults to get them again: measured,
that costs a quarter of a step. ``CHRONOMOE_KEEP_MEMORY=0`` refuses.
"""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the rest of the process; returns whether it does."""
    if os.environ.get("CHRONOMOE_KEEP_MEMORY", "1") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
