"""The knobs of a family's members, read from their source: names, types, bounds and the text under each field.

The command line needs them for its help before anything that loads torch may be imported, and Python itself keeps no
text of fields. A test holds that what is read here is what the classes have.
"""

import ast
from pathlib import Path
from typing import Any, NamedTuple

BOUNDS = ("ge", "gt", "le", "lt")
BASE = ".base"
"""Where a family's interface lies, which has no knobs."""


class Knob(NamedTuple):  # no dataclass: `dataclasses` takes 6 of the 40 ms of a help
    """One field of a configuration."""

    name: str
    type: str
    """As it is written, without None."""
    optional: bool
    """Whether None is a value."""
    default: Any
    """What stands there as text where it is no literal; None also for a field without one."""
    bounds: dict[str, float | int]
    help: str


def knobs_of(cls: type[Any]) -> tuple[Knob, ...]:
    """The knobs that a class declares, in order: those of a member that it extends first."""
    import inspect  # 4 of the 60 ms that `generate --help` takes, and the command line does not come here
    import textwrap

    knobs: dict[str, Knob] = {}
    for ancestor in reversed(cls.__mro__):
        if ancestor is cls or (ancestor.__module__.startswith("hildanext.") and not ancestor.__module__.endswith(BASE)):
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body
            knobs |= {knob.name: knob for knob in _knobs(node)}
    return tuple(knobs.values())


def knobs_in(package: Path, table: str) -> dict[str, tuple[Knob, ...]]:
    """The knobs of each member of a family: `table` is the name of its table in the package's `__init__.py`."""
    front = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    home = _imported(front.body)
    rows = _table(front, table)
    members = zip(map(_literal, filter(None, rows.keys)), map(ast.unparse, rows.values), strict=True)
    return {name: tuple(_with_extended(package, *home[member]).values()) for name, member in members}


def names_in(package: Path, table: str) -> tuple[str, ...]:
    """The names of a family's members, in the order of its table."""
    front = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    return tuple(map(_literal, filter(None, _table(front, table).keys)))


def _table(front: ast.Module, table: str) -> ast.Dict:
    (rows,) = [
        node.value
        for node in front.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table
    ]
    assert isinstance(rows, ast.Dict)
    return rows


def _class(package: Path, module: str, name: str) -> tuple[ast.ClassDef, dict[str, tuple[str, str]]]:
    """Of a module of the package, or of a package in it; and what its file imports."""
    parts = module.split(".")
    places = (package / f"{'/'.join(parts[at:])}.py" for at in reversed(range(len(parts))))
    file = next(place for place in places if place.is_file())
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name), _imported(body)


def _with_extended(package: Path, module: str, name: str) -> dict[str, Knob]:
    """The knobs of a class, those of a member that it extends first."""
    node, home = _class(package, module, name)
    knobs: dict[str, Knob] = {}
    for base in node.bases:
        where = home.get(ast.unparse(base))
        if where is None or not where[0].startswith(f"hildanext.{package.name}.") or where[0].endswith(BASE):
            continue
        knobs |= _with_extended(package, *where)
    return knobs | {knob.name: knob for knob in _knobs(node)}


def _imported(body: list[ast.stmt]) -> dict[str, tuple[str, str]]:
    """Each name that a file imports: the module it comes from, and its name there."""
    return {
        alias.asname or alias.name: (str(node.module), alias.name)
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _knobs(node: ast.stmt) -> tuple[Knob, ...]:
    assert isinstance(node, ast.ClassDef)
    knobs = []
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        parts = _parts(field.annotation)
        if parts[0].startswith("ClassVar"):
            continue
        default, bounds = _default(field.value)
        text = str(_literal(below.value)) if isinstance(below, ast.Expr) else ""
        kind = " | ".join(part for part in parts if part != "None")
        knobs.append(Knob(field.target.id, kind, "None" in parts, default, bounds, " ".join(text.split())))
    return tuple(knobs)


def _parts(annotation: ast.expr) -> list[str]:
    """The branches of a union, as they are written."""
    if isinstance(annotation, ast.BinOp):
        return [*_parts(annotation.left), *_parts(annotation.right)]
    return [annotation.id if isinstance(annotation, ast.Name) else ast.unparse(annotation)]


def _default(value: ast.expr | None) -> tuple[Any, dict[str, float | int]]:
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Field"):
        return _literal(value), {}
    keywords = {word.arg: word.value for word in value.keywords if word.arg is not None}
    bounds = {name: _literal(keywords[name]) for name in BOUNDS if name in keywords}
    return _literal(keywords.get("default")), bounds


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
