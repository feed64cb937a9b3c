"""Options from a TOML file (`--config`) and from `--set KEY=VALUE`."""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

# The types that a TOML value may have, by the type of the option, and their name.
_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str, int, float), "text, a number, or a list of these"),
    Path: ((str,), "a path"),
}


def from_file(context: typer.Context, path: Path | None) -> None:
    """Take the values of a TOML file for options that are not given otherwise."""
    if path is None:
        return
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{str(path)!r} cannot be read as TOML: {error}") from None
    options, types = _options(context), get_type_hints(context.command.callback)
    found = {}
    for key, value in values.items():
        name = _known(key, options, f"{str(path)!r} has").name
        found[name] = _checked(key, value, types[name], str(path))
    context.default_map = {**found, **(context.default_map or {})}


def from_pairs(context: typer.Context, pairs: Iterable[str] | None) -> None:
    """Take the values of `KEY=VALUE` for options that are not given otherwise."""
    options = _options(context)
    found = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"must be KEY=VALUE. Received: {pair!r}")
        found[_known(key.strip(), options, "Received").name] = value.strip()
    context.default_map = {**(context.default_map or {}), **found}


def _options(context: typer.Context) -> dict[str, Any]:
    """The options of a command by their long names, without dashes."""
    found = {p.opts[0].removeprefix("--"): p for p in context.command.params}
    return {name: p for name, p in found.items() if p.expose_value}


def _known(key: str, options: Mapping[str, Any], received: str) -> Any:
    name = key.replace("_", "-")
    if name not in options:
        near = difflib.get_close_matches(name, options, 1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(options)}."
        raise typer.BadParameter(f"{received} {key!r}, which is no option of this command.{hint}")
    return options[name]


def _checked(key: str, value: Any, kind: Any, path: str) -> Any:
    """A value of the file as an option of this type takes it; a list becomes text with commas."""
    plain = next((k for k in get_args(kind) if k in _TYPES), kind)
    allowed, expected = _TYPES[plain]
    values = value if plain is str and isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, allowed) or (isinstance(each, bool) and plain is not bool):
            raise typer.BadParameter(f"{key!r} in {path!r} must be {expected}. Received: {value!r}")
    return ",".join(map(str, values)) if plain is str else value
