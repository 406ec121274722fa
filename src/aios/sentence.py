"""Any exception as the one sentence that the command line and the pages show."""

import errno
import re

from chronomoe.errors import ChronoMoEError


def sentence(error: Exception) -> str:
    """What went wrong, in one sentence."""
    if isinstance(error, ChronoMoEError):
        return str(error)
    if isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error)):
        return "not enough memory; use a smaller --batch-size or --seq-len, or a smaller model (--dry-run tells sizes)."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; what was saved before is untouched; free some space."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}."
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (add --debug for the traceback)"
