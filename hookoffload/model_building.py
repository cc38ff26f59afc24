"""Models without values, made from a class or function and its configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from accelerate import init_empty_weights
from torch import nn

from .packed import is_wrapper
from .safetensors_header import CheckpointError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CONFIG_FILE = "config.json"


def build_empty(
    factory: Callable[..., ModuleT], config: Any, checkpoint: object
) -> ModuleT:
    """Make a model whose parameters are on the meta device, in eval mode.

    Args:
        factory: a class or a function.
        config: None: no arguments, or what a transformers or diffusers class finds in
            the checkpoint's folder; a mapping: keyword arguments; anything else: the
            only argument.
        checkpoint: what the model will be filled from.

    Raises:
        ValueError: The factory made no module.
        CheckpointError: The configuration in the folder cannot be used.
    """
    make = factory
    if config is None and isinstance(factory, type):
        make = _configured(factory, checkpoint) or factory
    with _plain_parameters_empty():
        if config is None:
            model = make()
        elif isinstance(config, Mapping):
            model = make(**config)
        else:
            model = make(config)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"{getattr(factory, '__name__', factory)!r} returned a "
                f"{type(model).__name__}, not a torch.nn.Module"
            )
        # Models of transformers that put a parameter into two places say so here.
        tie_weights = getattr(model, "tie_weights", None)
        if _has_config(type(model)) and callable(tie_weights):
            tie_weights()
    return model.eval()


@contextmanager
def _plain_parameters_empty() -> Iterator[None]:
    """Have parameters made on the meta device.

    Accelerate replaces each by a new one when it is registered. What quantises a model
    inside the factory registers wrappers around tensors that are empty already, and
    accelerate cannot make these.
    """
    register = nn.Module.register_parameter
    with init_empty_weights(include_buffers=False):
        register_empty = nn.Module.register_parameter

        def registered(
            module: nn.Module, name: str, parameter: nn.Parameter | None
        ) -> None:
            wraps = parameter is not None and is_wrapper(parameter)
            (register if wraps else register_empty)(module, name, parameter)

        nn.Module.register_parameter = registered  # type: ignore[assignment]
        yield


def _has_config(cls: type) -> bool:
    return hasattr(getattr(cls, "config_class", None), "from_pretrained")


def _configured(cls: Any, checkpoint: object) -> Callable[[], Any] | None:
    """Return what makes a model of a class from the folder's configuration."""
    if not isinstance(checkpoint, (str, os.PathLike)):
        return None
    folder = Path(checkpoint)
    if not (folder / _CONFIG_FILE).is_file():
        return None
    try:
        if _has_config(cls):
            config = cls.config_class.from_pretrained(folder)
            return lambda: cls(config)
        if hasattr(cls, "from_config") and hasattr(cls, "load_config"):
            config = cls.load_config(folder)
            return lambda: cls.from_config(config)
        if hasattr(cls, "from_config") and hasattr(cls, "_model_mapping"):
            automatic: Any = import_module(cls.__module__.partition(".")[0])
            config = automatic.AutoConfig.from_pretrained(folder)
            return lambda: cls.from_config(config)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / _CONFIG_FILE}: {cls.__name__} cannot be made from it: {error} "
            "Pass config=."
        ) from error
    return None
