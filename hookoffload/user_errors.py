"""Errors of the command line: which end it with one line, and that line."""

from __future__ import annotations

# What its reader can do something about; anything else is a bug, with a traceback.
# An `ImportError` names the extra that brings what is not installed.
EXPECTED_ERRORS = (ImportError, MemoryError, OSError, RuntimeError, ValueError)


def one_line(error: BaseException) -> str:
    """Returns what the error says, without line breaks."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return " ".join(f"{error.filename}: {error.strerror}".split())
    return " ".join(str(error).split()) or type(error).__name__
