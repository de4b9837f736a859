"""The documentation: what is generated is fresh, what it names is there, and the code it shows runs."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import hildanext
from hildanext import facade
from hildanext.core.errors import ConfigError, UnknownChoice

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    """A module of `hildanext/scripts`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "hildanext" / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_docs = script("make_docs")
draw_denoising = script("draw_denoising")
PICTURES = ROOT / "hildanext" / "docs" / "pictures"
PLACES = [
    make_docs.PACKAGE / "grading",
    ROOT,
    ROOT / "hildanext",
    ROOT / "hildanext" / "test",
    ROOT / "hildanext" / "scripts",
    make_docs.PACKAGE,
]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "hildanext").glob("*.md"), *(ROOT / "hildanext" / "docs").rglob("*.md")])
WRITTEN = [
    page for page in PAGES if "results" not in page.parts and page.name not in ("log.md", "tree.md", "methods.md")
]


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
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose)
        assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []

    @pytest.mark.parametrize("page", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
    def test_files_that_are_named_are_there(self, page):
        named = set(re.findall(r"(?<![\w/.<>-])(?:[a-z_0-9]+/)*[a-z_0-9]+\.py\b", page.read_text(encoding="utf-8")))
        assert [name for name in sorted(named) if not any((place / name).exists() for place in PLACES)] == []


class TestTheMovingPicture:
    TRACE = json.loads((PICTURES / "denoising.json").read_text(encoding="utf-8"))

    def test_it_is_what_its_trace_says(self):
        drawn = draw_denoising.draw(self.TRACE)
        shown = (PICTURES / "denoising.svg").read_text(encoding="utf-8")
        assert shown == drawn, "run: python hildanext/scripts/draw_denoising.py"
        assert len(shown) < 1_000_000

    def test_it_is_whole_and_holds_no_script(self):
        root = ElementTree.parse(PICTURES / "denoising.svg").getroot()
        assert root.tag.endswith("svg") and not [tag for tag in root.iter() if tag.tag.endswith("script")]

    def test_every_cell_ends_with_the_text_that_was_generated(self):
        row = self.TRACE["rows"][0]
        cells = [cell for block in draw_denoising.film(row).blocks.values() for _, cell in sorted(block.items())]
        kept = [text for _, kind, text in (cell.states[-1] for cell in cells) if kind == "kept"]
        assert "".join(kept) == row["text"].replace(" ", "")
        assert len(kept) == row["stats"]["tokens"]

    def test_every_edit_is_seen(self):
        row = self.TRACE["rows"][0]
        made = draw_denoising.film(row)
        cells = [cell for block in made.blocks.values() for cell in block.values()]
        assert sum(kind == "edit" for cell in cells for _, kind, _ in cell.states) == row["stats"]["edits"] > 0
        assert sum(bool(caption) for caption in made.captions) == row["stats"]["edits"] + 1


@pytest.fixture(scope="module")
def tiny():
    return hildanext.load("tiny", device="cpu", dtype="fp32", threads=1)


class TestTheFacade:
    def test_an_import_loads_no_torch_and_names_are_listed(self):
        code = (
            "import hildanext, sys; print('torch' in sys.modules, 'load' in dir(hildanext), 'stream' in dir(hildanext))"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.split() == ["False", "True", "True"]

    def test_a_name_that_is_not_there_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'train'"):
            hildanext.train  # noqa: B018

    def test_the_pieces_of_a_stream_are_the_text_of_a_generation(self, tiny):
        whole = hildanext.generate(tiny, "Once upon a time", max_new_tokens=21)
        pieces = list(hildanext.stream(tiny, "Once upon a time", max_new_tokens=21))
        assert len(pieces) > 1 and "".join(pieces) == whole.text
        assert whole.stats.tokens == len(whole.tokens) == 21

    def test_several_prompts_give_as_many_results(self, tiny):
        prompts = ["Once upon a time", "Tom and Lily"]
        together = hildanext.generate(tiny, prompts, mode="quality", max_new_tokens=8)
        assert [result.text for result in together] == [
            hildanext.generate(tiny, prompt, mode="Q_MODE", max_new_tokens=8).text for prompt in prompts
        ]

    def test_fields_of_the_decoder_are_laid_over_the_mode(self, tiny):
        edited = hildanext.generate(tiny, "Once upon a time", max_new_tokens=11)
        plain = hildanext.generate(tiny, "Once upon a time", decoder={"tau_edit": None}, max_new_tokens=11)
        assert edited.stats.edits > 0 == plain.stats.edits

    def test_what_does_not_exist_is_an_error_before_anything_runs(self, tiny):
        with pytest.raises(ConfigError, match="max_tokens"):
            hildanext.generate(tiny, "Once", max_tokens=3)
        with pytest.raises(ConfigError, match="tau_maks"):
            hildanext.stream(tiny, "Once", decoder={"tau_maks": 0.5})
        with pytest.raises(UnknownChoice):
            hildanext.generate(tiny, "Once", mode="X_MODE")

    def test_a_stream_that_nobody_reads_stops_its_model(self, tiny, monkeypatch):
        ran, generate = [], facade.generate

        def counted(*arguments):
            *positional, on_event = arguments
            return generate(*positional, lambda event: (ran.append(event.kind), on_event(event)))

        monkeypatch.setattr(facade, "generate", counted)
        pieces = hildanext.stream(tiny, "Once upon a time", max_new_tokens=200)
        next(pieces)
        pieces.close()
        assert 0 < ran.count("step") < 100

    @pytest.mark.parametrize("page", ["README.md", "hildanext/docs/decoding.md"])
    def test_the_lines_of_python_that_a_page_shows_run(self, page, capsys):
        (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
        assert page != "README.md" or len([line for line in code.splitlines() if line.strip()]) <= 8
        exec(compile(code, page, "exec"), {})
        assert "there was a little girl named Lily" in capsys.readouterr().out


class TestDesign:
    TEXT = (ROOT / "hildanext" / "DESIGN.md").read_text(encoding="utf-8")

    def test_the_drawn_order_of_rooms_is_the_one_that_imports_are_held_to(self):
        drawn = self.TEXT.partition("## The order of rooms")[2].split("```")[1]
        assert [name for line in drawn.strip().splitlines() for name in line.split()[1:]] == make_docs.rooms()

    def test_every_decision_is_in_the_index(self):
        folder = ROOT / "hildanext" / "docs" / "decisions"
        index = (folder / "README.md").read_text(encoding="utf-8")
        assert [page.name for page in folder.glob("*.md") if f"({page.name})" not in index] == ["README.md"]
