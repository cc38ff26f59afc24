"""The model and the input that ``hookoffload bench`` runs, from a folder and names."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .importing import explained, imported
from .opened_file import explain_missing

TOKENS = 128

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a model; what `load_model` takes.

    Attributes:
        name: Of its class.
        factory: Called to make it.
        config: Called with this; see `load_model`.
    """

    name: str
    factory: Callable[..., nn.Module]
    config: Any


def recipe_for(folder: Path, class_name: str | None) -> Recipe:
    """Finds out how to make the model of a folder.

    Args:
        folder: With a config.json of transformers or diffusers, or of keyword
            arguments for the class.
        class_name: ``package.module:Class``; None takes the class that config.json
            names, from diffusers or transformers.

    Raises:
        ValueError: The class is not named, or is not there.
    """
    if not folder.is_dir():
        what = (
            "is a file, not a folder." if folder.exists() else explain_missing(folder)
        )
        raise ValueError(f"{folder}: {what}")
    config = _read_config(folder)
    cls = _named_in(config, folder) if class_name is None else imported(class_name)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        named = class_name or f"the class of {folder / 'config.json'}"
        raise ValueError(f"{named} is {cls!r}, not a class of torch.nn.Module")
    from_config = getattr(cls, "from_config", None)
    config_class = getattr(cls, "config_class", None)
    if config_class is not None:  # transformers
        made = _transformers_config(config_class, folder)
        return Recipe(name=cls.__name__, factory=cls, config=made)
    if from_config is not None:  # diffusers
        factory = functools.partial(from_config, config)
        return Recipe(name=cls.__name__, factory=factory, config=None)
    return Recipe(name=cls.__name__, factory=cls, config=config or None)


def _transformers_config(config_class: Any, folder: Path) -> Any:
    try:
        return config_class.from_pretrained(str(folder))
    except Exception as error:
        raise ValueError(
            f"{folder / 'config.json'}: {config_class.__name__} cannot be made from "
            f"it: {explained(error)}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: is not a JSON object")
    return config


def _named_in(config: Mapping[str, Any], folder: Path) -> Any:
    """Returns the class that a configuration of diffusers or transformers names."""
    names = config.get("architectures") or []
    if isinstance(config.get("_class_name"), str):
        package, name = "diffusers", config["_class_name"]
    elif isinstance(names, list) and names and isinstance(names[0], str):
        package, name = "transformers", names[0]
    else:
        raise ValueError(
            f"{folder}: has no config.json that names the model's class "
            '("architectures" or "_class_name"). Pass --class package.module:Class'
        )
    try:
        library = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{folder}: is a model of {package}, which cannot be imported: {error}. "
            f"Install it (pip install {package}), or pass --class package.module:Class"
        ) from error
    cls = getattr(library, name, None)
    if cls is None:
        raise ValueError(
            f"{folder}: names the class {name}, which {package} "
            f"{library.__version__} does not have. Update it, or pass --class "
            "package.module:Class"
        )
    return cls


def make_input(model: nn.Module, name: str | None) -> Inputs:
    """Returns the arguments of a forward.

    Args:
        model: The model.
        name: ``package.module:function``. The function is called with the model and
            returns a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments. None makes token ids for a transformers text model.

    Raises:
        ValueError: There is no function, and the model takes no token ids.
    """
    if name is None:
        return (), _tokens_for(model)
    function = imported(name)
    try:
        made = function(model)
    except Exception as error:
        raise ValueError(f"--input {name} failed: {explained(error)}") from error
    if isinstance(made, Mapping):
        return (), dict(made)
    if isinstance(made, tuple | list):
        return tuple(made), {}
    return (made,), {}


def _tokens_for(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if getattr(model, "main_input_name", None) != "input_ids" or not vocabulary:
        raise ValueError(
            f"{type(model).__name__} is no text model of transformers: pass --input "
            "package.module:function, a function that is called with the model and "
            "returns the arguments of a forward"
        )
    most = getattr(text, "max_position_embeddings", None) or TOKENS
    generator = torch.Generator().manual_seed(0)
    count = min(TOKENS, most)
    return {"input_ids": torch.randint(vocabulary, (1, count), generator=generator)}


def run_forward(model: nn.Module, inputs: Inputs) -> None:
    """Runs one forward.

    Raises:
        RuntimeError: The model does not take this input.
    """
    args, kwargs = inputs
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except RuntimeError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"the forward of {type(model).__name__} failed: {explained(error)}. "
            "--input package.module:function makes another input"
        ) from error
