"""What a user names on the command line: ``package.module:thing``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def imported(name: str) -> Any:
    """Imports what ``package.module:thing`` names, also from the current folder.

    Raises:
        ValueError: There is no such thing.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ValueError(f"{name!r} should be package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does, for the script as well
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    except Exception as error:  # of the module's own code
        raise ValueError(f"{name!r} cannot be imported: {explained(error)}") from error
    return found


def explained(error: Exception) -> str:
    """Returns an error of somebody else's code with its kind, which says the most."""
    return f"{type(error).__name__}: {error}"
