"""Families of interchangeable algorithms: a table and `build`, which is also where research members are refused.

A member with `research = True` is built inside `under_profile("FULL")` alone. Nobody has to remember to ask: where no
profile was named it is SAFE.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hildanext.core.config import validate
from hildanext.core.errors import ConfigError, UnknownChoice

Member = TypeVar("Member")

PROFILES = ("SAFE", "FULL")


@dataclass(frozen=True)
class _Profile:
    name: str = "SAFE"
    where: str | None = None
    research: set[str] = field(default_factory=set)


_profile: ContextVar[_Profile] = ContextVar("profile")


@contextmanager
def under_profile(profile: str, where: str | None = None) -> Iterator[set[str]]:
    """Build what is built in here under a profile; yields the names of research members as they are built.

    `where` begins the error of a refused one. Raises `ConfigError` for a profile that does not exist.
    """
    here = _Profile(_known(profile), where)
    token = _profile.set(here)
    try:
        yield here.research
    finally:
        _profile.reset(token)


def choose_profile(run: Mapping[str, Any]) -> None:
    """From here on in this context, the profile that a run names. Raises as `under_profile`."""
    profile = run.get("profile", "SAFE")
    _profile.set(_Profile(_known(profile)))


def build(kind: str, table: Mapping[str, type[Member]], section: Mapping[str, Any], strict: bool = False) -> Member:
    """Build a family member from its section `{"name": ..., knobs}`; `strict` as in `validate`.

    Raises `UnknownChoice` for a name outside the table and `ConfigError` for a knob that the
    member does not have, a value of the wrong type, or a research member under SAFE.
    """
    config = dict(section)
    name = config.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{kind} has no name", f'give one: {{"name": ...}}, of {", ".join(sorted(table))}')
    if name not in table:
        raise UnknownChoice(kind, name, table)
    if getattr(table[name], "research", False):
        admit(kind, name)
    return validate(table[name], config, where=f"{kind} {name}", strict=strict)


def _known(profile: Any) -> str:
    if profile not in PROFILES:
        raise ConfigError(f"profile {profile!r}", f"profiles: {', '.join(PROFILES)}")
    return str(profile)


def admit(kind: str, name: str) -> None:
    """Raise `ConfigError` for a research method under SAFE, where it is no member of a family (`build` asks itself)."""
    profile = _profile.get(_Profile())
    if profile.name != "FULL":
        where = profile.where if profile.where is not None else kind
        raise ConfigError(f"{where}: {name!r} is a FULL method", 'set "profile": "FULL" to allow it')
    profile.research.add(name)
