"""The documentation that is told by the code: the tree, the methods, and the README's tree.

python hildanext/scripts/make_docs.py            write docs/tree.md, docs/methods.md and the README's tree
python hildanext/scripts/make_docs.py --check    write nothing; exit code 1 where one of them is stale

Everything is read from docstrings and tables without importing the package. A line of the tree is the first line of a
module's docstring. A method is a class, function or module whose docstring names a paper (`Paper:`, or an arXiv id) or
says how it differs from one (`Differs:`); `State:` says what else there is to know of its state.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hildanext" / "backend" / "src" / "hildanext"
ORDER = ROOT / "hildanext" / "test" / "test_architecture.py"
COMMAND = "python hildanext/scripts/make_docs.py"
NOTICE = f"Generated from the docstrings by `{COMMAND}`; a test holds it. Do not edit it by hand."
BEGIN, END = "<!-- tree: made by hildanext/scripts/make_docs.py -->", "<!-- end of tree -->"

NOT_THERE_YET = (
    ("D2F", "2508.09192", "several blocks in flight, a decoder"),
    ("CARD", "2601.22031", "causal diffusion, a training; its gate is the rule `card`"),
    ("KVzap", "2601.07891", "pruning of keys and values by learnt scores"),
)
"""Named by the specification and not written; each moves into the table above by its own docstring."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    room: str
    name: str
    row: str
    summary: str
    paper: str
    differs: str
    file: str
    state: str


def rooms() -> list[str]:
    """The order of rooms, as the architecture test holds it."""
    for node in ast.parse(ORDER.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS":
            words = node.value.func.value  # type: ignore[attr-defined]  # ("a b c").split()
            return str(ast.literal_eval(words)).split()
    raise ValueError(f"no ROOMS in {ORDER}")


def parsed(package: Path = PACKAGE) -> dict[str, ast.Module]:
    """Every file below the package by its path in it, packages before what they hold."""
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    return {name: ast.parse(files[name].read_text(encoding="utf-8")) for name in sorted(files, key=_reading_order)}


def _reading_order(name: str) -> tuple[str, bool, str]:
    folder, _, file = name.rpartition("/")
    return folder, file != "__init__.py", file


def paragraphs(node: Documented) -> list[str]:
    """The docstring's paragraphs, each on one line."""
    text = ast.get_docstring(node) or ""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def first_line(node: Documented) -> str:
    """The docstring's first paragraph, which a house rule keeps to a line."""
    return next(iter(paragraphs(node)), "")


def room_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def head_of(modules: Mapping[str, ast.Module], room: str) -> tuple[str, ast.Module]:
    """How a room or a front door is written, and the module whose docstring speaks for it."""
    if f"{room}.py" in modules:
        return f"{room}.py", modules[f"{room}.py"]
    return f"{room}/", modules[f"{room}/__init__.py"]


def tree(modules: Mapping[str, ast.Module], order: list[str]) -> str:
    """docs/tree.md: every file with its line, room by room."""
    lines = ["# The tree", "", NOTICE, ""]
    lines += ["Rooms and front doors (single files) in the order in which they may import, lowest first: each imports"]
    lines += ["those above it in this list alone. Paths are below `hildanext/backend/src/hildanext/`.", ""]
    for room in order:
        title, head = head_of(modules, room)
        lines += [f"## `{title}`", "", ast.get_docstring(head) or "" if title.endswith("/") else first_line(head), ""]
        members = [name for name in modules if name.startswith(title) and title.endswith("/")]
        lines += [f"- `{name}`: {first_line(modules[name])}" for name in members if not name.endswith("__init__.py")]
        lines += [""] if members else []
    return "\n".join(lines).rstrip() + "\n"


def readme_tree(modules: Mapping[str, ast.Module], order: list[str]) -> str:
    """The README's tree: one line for each room and front door, up to its first full stop or semicolon."""
    lines = ["```", "hildanext/backend/src/hildanext/"]
    for room in order:
        title, head = head_of(modules, room)
        lines.append(f"  {title:<19}{re.split('(?<=[?])|[.;] ', first_line(head))[0].rstrip('.')}")
    return "\n".join([*lines, "```"])


def table_rows(modules: Mapping[str, ast.Module]) -> dict[tuple[str, str], str]:
    """(folder, class) to the name under which a family's table lists it: module-level `TABLE = {"name": Class}`."""
    rows: dict[tuple[str, str], str] = {}
    for file, module in modules.items():
        for node in module.body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            if isinstance(value, ast.Dict):
                for key, member in zip(value.keys, value.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(member, ast.Name):
                        rows[folder_of(file), member.id] = str(key.value)
    return rows


def folder_of(file: str) -> str:
    return file.rpartition("/")[0]


def methods(modules: Mapping[str, ast.Module]) -> Iterator[Method]:
    """What names a paper, or says how it differs from one, in the order of the files."""
    rows = table_rows(modules)
    for file, module in modules.items():
        for node in ast.walk(module):
            if not isinstance(node, Documented):
                continue
            parts = paragraphs(node)
            said = dict(re.findall(r"(Paper|Differs|State): (.*?)(?= (?:Differs|State): |$)", "\n".join(parts), re.M))
            cited = list(dict.fromkeys(re.findall(r"arXiv:\d{4}\.\d{5}", " ".join(parts))))
            if said or cited:
                name = getattr(node, "name", Path(file).stem)
                paper = said.get("Paper", ", ".join(cited))
                state = said.get("State", "FULL" if _is_research(node) else "works")
                row = rows.get((folder_of(file), name), "")
                summary = parts[0].partition(" Paper: ")[0]
                yield Method(room_of(file), name, row, summary, paper, said.get("Differs", ""), file, state)


def _linked(text: str) -> str:
    """arXiv ids as links."""
    return re.sub(r"(?:arXiv:)(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)


def _is_research(node: Documented) -> bool:
    """Whether a class says `research = True`: the profile FULL alone builds it."""
    fields = node.body if isinstance(node, ast.ClassDef) else []
    return any(
        isinstance(line, ast.AnnAssign) and getattr(line.target, "id", "") == "research"
        and isinstance(line.value, ast.Constant) and line.value.value is True
        for line in fields
    )  # fmt: skip


def methods_page(modules: Mapping[str, ast.Module], order: list[str]) -> str:
    """docs/methods.md: method, paper, what differs, file and state."""
    lines = ["# Methods", "", NOTICE, ""]
    lines += ['A name in code type is what a configuration calls the member (`{"name": ...}`). State: *works* is built']
    lines += ["and tested; *FULL* works too, but only a run whose profile is FULL may build it.", ""]
    rows = list(methods(modules))
    for room in order:
        members = [method for method in rows if method.room == room]
        if members:
            lines += [f"## {room}", "", "| method | what | paper | differs | file | state |", "|---" * 6 + "|"]
            lines += [_row(method) for method in members] + [""]
    lines += ["## Not there yet", "", "| method | what | paper |", "|---|---|---|"]
    lines += [f"| {name} | {what} | {_linked('arXiv:' + paper)} |" for name, paper, what in NOT_THERE_YET]
    return "\n".join(lines) + "\n"


def _row(method: Method) -> str:
    name = f"{method.name} (`{method.row}`)" if method.row else method.name
    link = f"[{method.file}](../backend/src/hildanext/{method.file})"
    cells = [name, method.summary, _linked(method.paper) or "ours", method.differs or "-", link, method.state]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def pages() -> dict[Path, str]:
    """Each generated file with what it must hold."""
    modules, order = parsed(), rooms()
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    docs = ROOT / "hildanext" / "docs"
    return {
        docs / "tree.md": tree(modules, order),
        docs / "methods.md": methods_page(modules, order),
        readme: f"{before}{BEGIN}\n{readme_tree(modules, order)}\n{END}{after}",
    }


def stale() -> list[Path]:
    """Generated files that do not hold what they must."""
    wanted = pages()
    return [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file is stale")
    check = parser.parse_args().check
    for path in stale():
        print(f"{'stale' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if check:
            print(f"run: {COMMAND}")
            return 1
        path.write_text(pages()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
