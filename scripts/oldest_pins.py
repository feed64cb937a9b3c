"""Print pip constraints that select the oldest versions allowed by pyproject.toml.

Each requirement `name>=1.2` becomes the constraint `name==1.2.0`. Requirements of the package are
always included, requirements of its extras only if the extras are named as arguments:

    python scripts/oldest_pins.py dev export plots > oldest.txt
    pip install -c oldest.txt -e ".[dev,export,plots]"

Indirect dependencies are not pinned, so pip chooses their versions.
"""

import argparse
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"

# Captures the name of a requirement, without its extras, and the version after `>=` or `==`.
_LOWEST = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?[^;]*?[=>]=\s*([0-9][^\s,;]*)")


def main() -> None:
    """Print one constraint per line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", help="extras of the package to pin as well")
    print("\n".join(pins(PYPROJECT, parser.parse_args().extras)))


def pins(pyproject: Path, extras: Iterable[str]) -> list[str]:
    """The constraints that select the oldest allowed versions.

    Args:
        pyproject: Path of `pyproject.toml`.
        extras: Names of the extras whose requirements are pinned as well.

    Returns:
        One string `name==version` per requirement.

    Raises:
        ValueError: If `pyproject.toml` does not define an extra, or if a requirement has no lowest
            version.
    """
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    return [_pin(requirement) for requirement in _requirements(project, extras)]


def _requirements(project: dict[str, Any], extras: Iterable[str]) -> Iterator[str]:
    yield from project["dependencies"]
    for extra in extras:
        known = project["optional-dependencies"]
        if extra not in known:
            raise ValueError(f"There is no extra {extra!r}, only {', '.join(known)}.")
        yield from known[extra]


def _pin(requirement: str) -> str:
    match = _LOWEST.match(requirement)
    if match is None:
        raise ValueError(f"{requirement!r} has no lowest version: write it as `name>=version`.")
    version = match[2] + ".0" * max(0, 2 - match[2].count("."))  # 13 and 13.0 become 13.0.0
    return f"{match[1]}=={version}"


if __name__ == "__main__":
    main()
