"""The documentation: what is generated is fresh, what it names is there, and the code it shows runs."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    """A module of `hildanext/scripts`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "hildanext" / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_docs = script("make_docs")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "hildanext").glob("*.md"), *(ROOT / "hildanext" / "docs").rglob("*.md")])


class TestWhatIsGenerated:
    def test_tree_and_methods_are_what_the_code_says(self):
        stale = [path.relative_to(ROOT).as_posix() for path in make_docs.stale()]
        assert stale == [], f"run: {make_docs.COMMAND}"

    def test_a_new_file_is_seen(self):
        modules = make_docs.parsed() | {"losses/new.py": make_docs.ast.parse('"""A new loss."""')}
        text = make_docs.tree(modules, make_docs.rooms())
        assert "- `losses/new.py`: A new loss." in text

    def test_every_file_is_in_the_tree_once(self):
        lines = (ROOT / "hildanext/docs/tree.md").read_text(encoding="utf-8").splitlines()
        named = [line.split("`")[1] for line in lines if re.match(r"(- |## )`.*\.py`", line)]
        assert sorted(named) == sorted(name for name in make_docs.parsed() if not name.endswith("__init__.py"))

    def test_a_method_says_row_paper_difference_and_state(self):
        source = '''"""Toys.

T = {"toy": Toy}
"""
class Toy:
    """Does a thing.

    Paper: Someone, arXiv:2501.00001, sec. 3.
    Differs: in a line
    that goes on.
    """

    research: ClassVar[bool] = True


def helper():
    """Of arXiv:2501.00002."""


def plain():
    """Nothing."""
'''
        modules = {
            "toys/__init__.py": make_docs.ast.parse('TOYS: dict[str, type] = {"toy": Toy}'),
            "toys/toy.py": make_docs.ast.parse(source),
        }
        toy, helper = make_docs.methods(modules)
        assert (toy.row, toy.paper, toy.differs, toy.state) == (
            "toy",
            "Someone, arXiv:2501.00001, sec. 3.",
            "in a line that goes on.",
            "FULL",
        )
        assert (helper.paper, helper.differs, helper.state) == ("arXiv:2501.00002", "", "works")


class TestWhatIsNamed:
    @pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
    def test_links_lead_somewhere(self, page):
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
