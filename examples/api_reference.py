"""Writes the API reference, examples/api.md, from the docstrings.

    python examples/api_reference.py

A test compares the file with what this makes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hookoffload
from hookoffload.cost import CurvePoint, Prediction
from hookoffload.run_report import Bound, LayerReport

TARGET = Path(__file__).with_name("api.md")
# Classes that users make; the others they are given.
MADE = (hookoffload.OffloadPolicy, hookoffload.Placement, hookoffload.Rates)
# No names of the package, but what its functions return.
RETURNED = (Prediction, CurvePoint, LayerReport, Bound)
_WIDTH = 88
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example):$")
_ENTRY = re.compile(r"^(\*{0,2}\w+): (.*)$")


def reference() -> str:
    """Returns the whole reference as markdown."""
    things = [getattr(hookoffload, name) for name in hookoffload.__all__]
    functions = [thing for thing in things if inspect.isfunction(thing)]
    classes = [thing for thing in things if inspect.isclass(thing)]
    errors = [one for one in classes if issubclass(one, Exception)]
    values = [one for one in classes if one not in errors]
    lines = [
        "# API reference",
        "",
        "Made from the docstrings by `python examples/api_reference.py`. Everything is",
        "imported from `hookoffload`. Sizes are in bytes where a name says so, limits",
        "in GiB (2\\*\\*30 bytes), times in seconds.",
    ]
    for title, members in (
        ("Functions", functions),
        ("Classes", values),
        ("Errors", errors),
        ("What these return", RETURNED),
    ):
        lines += ["", f"## {title}"]
        for member in members:
            lines += ["", f"### `{member.__name__}`", "", *_described(member)]
    return "\n".join(lines) + "\n"


def _described(thing: Any) -> Iterator[str]:
    """Yields what one function or class is, and below a class its methods."""
    if inspect.isfunction(thing):
        yield from _code(_signature(thing.__name__, thing))
        yield from _markdown(inspect.getdoc(thing) or "")
        return
    if issubclass(thing, Exception):
        base = thing.__bases__[0].__name__
        yield from [f"A `{base}`.", ""]
    elif thing in MADE:
        yield from _code(_signature(thing.__name__, thing))
    yield from _markdown(inspect.getdoc(thing) or "")
    for name, member in vars(thing).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield from ["", f"**`.{name}`**: {_joined(member.fget.__doc__)}"]
        elif isinstance(member, classmethod) or inspect.isfunction(member):
            yield ""
            yield from _code(_signature(f"{thing.__name__}.{name}", member))
            yield from _markdown(inspect.getdoc(member) or "")


def _signature(name: str, thing: Any) -> str:
    """Writes a signature on one line, or one line an argument where it is too long."""
    if isinstance(thing, classmethod):
        thing = thing.__func__
    signature = inspect.signature(thing)
    parameters = [
        one for key, one in signature.parameters.items() if key not in ("self", "cls")
    ]
    arguments = [_argument(one) for one in parameters]
    kinds = [one.kind for one in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and (
        inspect.Parameter.VAR_POSITIONAL not in kinds
    ):
        arguments.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    answer = signature.return_annotation
    arrow = ""
    if not inspect.isclass(thing) and answer is not inspect.Signature.empty:
        arrow = f" -> {_annotation(answer)}"
    line = f"{name}({', '.join(arguments)}){arrow}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {one}," for one in arguments), f"){arrow}"])


def _argument(one: inspect.Parameter) -> str:
    stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
    text = f"{stars}{one.name}"
    if one.annotation is not one.empty:
        text += f": {_annotation(one.annotation)}"
    if one.default is not one.empty:
        text += f" = {one.default!r}"
    return text


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else annotation.__name__


def _code(text: str) -> list[str]:
    return ["```python", text, "```", ""]


def _joined(text: str | None) -> str:
    return " ".join((text or "").split())


def _markdown(doc: str) -> Iterator[str]:
    """Turns a docstring in Google's style into markdown."""
    section, in_example = "", False
    for line in doc.splitlines():
        if not in_example:
            line = line.replace("2**30", r"2\*\*30")  # or it might become bold
        found = _SECTION.match(line)
        if found:
            section = found.group(1)
            in_example = section == "Example"
            yield from (["**Example**", "", "```pycon"] if in_example else [])
            yield from ([] if in_example else [f"**{section}**", ""])
        elif not section:
            yield line
        elif in_example:
            yield line.removeprefix("    ")
        else:
            yield _listed(line.removeprefix("    "), section)
    if in_example:
        yield "```"


def _listed(line: str, section: str) -> str:
    """Makes a list of the entries of a section; what is longer hangs below."""
    entry = _ENTRY.match(line)
    if entry and section != "Returns":
        return f"- `{entry.group(1)}`: {entry.group(2)}"
    return f"  {line.strip()}" if section != "Returns" and line else line


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
