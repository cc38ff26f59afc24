"""The classes of both libraries, and one trial of one of them."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import warnings

import torch

from .recipe import CannotBeBuiltError
from .trial import Place, Result, run_trial

LIBRARIES = ("transformers", "diffusers")


def class_names(library: str, *, every: bool) -> list[str]:
    """Return names of a library's model classes.

    Args:
        library: one of `LIBRARIES`.
        every: False leaves out the further heads of an architecture.
    """
    if library == "transformers":
        from . import transformer_models

        names = transformer_models.class_names
        return names() if every else transformer_models.base_class_names()
    from . import diffusion_models

    return diffusion_models.class_names()


def prepare_process(most_bytes: int) -> None:
    """Make a process quiet, offline and unable to take the machine's memory."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as it lives)
    torch.backends.cudnn.deterministic = True  # or a class differs from run to run
    if not torch.cuda.is_available():  # CUDA reserves far more than it takes
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))


def try_class(library: str, name: str, place: Place) -> Result:
    """Build a class small and try it; whatever happens comes back as a result.

    Args:
        library: one of `LIBRARIES`.
        name: of a class in it.
        place: where to run it.
    """
    start = time.monotonic()
    try:
        if library == "transformers":
            from .transformer_models import recipe
        else:
            from .diffusion_models import recipe
        found = recipe(name)
    except CannotBeBuiltError as error:
        result = Result(name=name, outcome="unbuilt", reason=str(error))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        result = Result(name=name, outcome="unbuilt", reason=reason)
    else:
        try:
            result = run_trial(name, found, place)
        except Exception as error:
            reason = f"outside the library: {type(error).__name__}: {error}"
            result = Result(name=name, outcome="failed", reason=reason[:500])
    return dataclasses.replace(result, seconds=time.monotonic() - start)
