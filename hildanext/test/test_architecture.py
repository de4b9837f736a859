"""The house: the order of rooms, sizes, families, promised names, and what an import may cost."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from hildanext.cli import VERBS
from hildanext.stages import STAGES

PACKAGE = Path(importlib.util.find_spec("hildanext").origin).parent
TESTS = Path(__file__).parent

ROOMS = (
    "core grading masks diffusion tokenization detokenization data datasets models corruption ar kv_cache export "
    "losses decoding runtimes inference exact facade likelihood trainer training engine rl wsd_stage0 drafts_stage0 "
    "sft_stage1 rl_stage2 eval bench memory_plan report recipe jobs stages serve api commands cli"
).split()
"""Rooms and front doors in the order in which they may import, lowest first; `DESIGN.md` draws it."""

FAMILIES = {
    "hildanext.data.sources": ("SOURCES", "hildanext.data.sources.base", "Source"),
    "hildanext.data.sources.chat": ("CHATS", "hildanext.data.sources.chat.base", "ChatSource"),
    "hildanext.data.causal_graphs": ("EXTRACTORS", "hildanext.data.causal_graphs.base", "Extractor"),
    "hildanext.data.problems": ("PROBLEMS", "hildanext.data.problems.base", "ProblemSet"),
    "hildanext.losses": ("LOSSES", "hildanext.losses.base", "TokenLoss"),
    "hildanext.kv_cache.prune": ("PRUNES", "hildanext.kv_cache.prune.base", "Prune"),
    "hildanext.decoding": ("DECODERS", "hildanext.decoding.base", "Decoder"),
    "hildanext.decoding.orders": ("ORDERS", "hildanext.decoding.orders.base", "Order"),
    "hildanext.likelihood": ("LIKELIHOODS", "hildanext.likelihood.base", "Likelihood"),
    "hildanext.grading": ("REWARDS", "hildanext.grading.base", "Reward"),
    "hildanext.rl.advantages": ("ADVANTAGES", "hildanext.rl.advantages.base", "Advantage"),
    "hildanext.rl.likelihoods": ("POLICY_LIKELIHOODS", "hildanext.rl.likelihoods.base", "PolicyLikelihood"),
    "hildanext.rl.rollouts": ("ROLLOUTS", "hildanext.rl.rollouts.base", "Rollouts"),
    "hildanext.rl.plugins": ("PLUGINS", "hildanext.rl.plugins.base", "Plugin"),
    "hildanext.rl.objectives": ("OBJECTIVES", "hildanext.rl.objectives.base", "Objective"),
    "hildanext.eval.tasks": ("TASKS", "hildanext.eval.tasks.base", "Task"),
}

PROMISED = {
    "hildanext.masks": ["may_attend", "doubled", "same_document", "clean_only"],
    "hildanext.diffusion": ["mask_tokens", "replace_tokens", "complement", "block_times", "targets", "NoisedBatch"],
    "hildanext.tokenization": ["resolve_mask_id", "real_ids"],
    "hildanext.data.chat_template": ["Example", "Message", "Rendering", "render", "encode_chat"],
    "hildanext.datasets": ["prepare", "PrepareConfig", "PrepareKnobs", "PackedDataset", "Batch", "batches"],
    "hildanext.ar": ["Parent", "ArResult", "sample_documents"],
    "hildanext.training": [],
    "hildanext.inference": ["generate", "Completion", "GenerationConfig", "GenerationKnobs"],
    "hildanext.wsd_stage0": ["convert"],
    "hildanext.sft_stage1": ["sft"],
    "hildanext.recipe": ["execute", "check"],
    "hildanext.cli": ["main", "VERBS"],
    "hildanext.models.loading.load": ["load_parent", "load_diffusion"],
    "hildanext.models.checkpoint": ["save_diffusion", "merge_checkpoints"],
    "hildanext.models.start": ["start_conversion"],
    "hildanext.decoding": ["MODES", "DECODERS"],
    "hildanext.core.metrics_log": ["METRICS", "MetricLog", "read_metrics", "run_metrics"],
    "hildanext.core.logging_setup": ["configure_logging"],
    "hildanext.core.run_dir": ["open_run", "write_atomically", "save_folder_atomically"],
}

MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(NAMES, MODULES, strict=True)}


def room(name: str) -> str:
    """The room's name for a file or a dotted module below the package."""
    return name.replace("\\", "/").split("/")[0].removesuffix(".py")


def imported_rooms(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hildanext":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hildanext.")}
    return names - {"__version__"}


@pytest.mark.parametrize("name", NAMES)
def test_imports_follow_the_order_of_rooms(name):
    here = room(name)
    if here == "__init__":
        assert not imported_rooms(TREES[name])
        return
    assert here in ROOMS, f"{here} is not in the order of rooms"
    for other in imported_rooms(TREES[name]) - {here}:
        assert other in ROOMS, f"{name} imports {other}, which is not in the order of rooms"
        assert ROOMS.index(other) < ROOMS.index(here), f"{name} imports {other}, which comes after it"


def test_the_order_of_rooms_is_what_the_package_holds():
    assert set(ROOMS) == {room(name) for name in NAMES} - {"__init__"}


def modules_imported_by(name: str) -> set[str]:
    """Files below the package that a file imports while it is itself imported (not inside functions)."""
    nodes, imported = list(TREES[name].body), set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hildanext"):
            base = node.module.replace(".", "/").removeprefix("hildanext").lstrip("/")
            for alias in node.names:
                choices = [f"{base}/{alias.name}.py", f"{base}/{alias.name}/__init__.py", f"{base}.py"]
                choices = [choice.lstrip("/") for choice in [*choices, f"{base}/__init__.py"]]
                imported |= {next(choice for choice in choices if choice in TREES)}
    return imported


def test_no_circle_of_imports():
    waiting = {name: modules_imported_by(name) - {name} for name in NAMES}
    while ready := {name for name, needs in waiting.items() if not needs & set(waiting)}:
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}
    assert not waiting, f"these import each other, or what does: {sorted(waiting)}"


@pytest.mark.parametrize("name", NAMES)
def test_a_module_has_at_most_500_lines_and_a_function_60(name):
    assert len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) <= 500, "one concept a file: is it two?"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{name}: {node.name} has {length} lines"


@pytest.mark.parametrize("name", NAMES)
def test_no_except_is_broad(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {getattr(kind, "id", None) for kind in caught}
            assert node.type is not None and not names & {"Exception", "BaseException"}, f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", NAMES)
def test_a_module_opens_with_what_lives_in_it(name):
    if TREES[name].body:
        assert ast.get_docstring(TREES[name]), f"{name} has no docstring"


def test_no_module_is_a_drawer():
    assert not {"utils", "common", "helpers", "io", "types", "logging"} & {Path(name).stem for name in NAMES}


def test_every_module_is_importable_and_every_configuration_can_say_what_it_takes():
    """As JSON Schema, which `core/complaints.py` puts into words, and without a warning."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "hildanext."):
        if not module.name.endswith("__main__"):
            for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
                if is_dataclass(kind) and "__pydantic_fields__" in vars(kind):
                    assert TypeAdapter(kind).json_schema()["type"] == "object"


@pytest.mark.parametrize("package", FAMILIES)
def test_every_member_file_has_a_row(package):
    table, base_module, base_name = FAMILIES[package]
    members = getattr(importlib.import_module(package), table)
    base = getattr(importlib.import_module(base_module), base_name)
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            own = kind.__module__ == module.name and module.name != base_module
            configured = "__dataclass_fields__" in vars(kind)  # what joins members (PerRow) has no knobs of its own
            if own and issubclass(kind, base) and configured and not kind.__name__.startswith("_"):
                assert kind in members.values(), f"{module.name}.{kind.__name__} has no row in {table}"


@pytest.mark.parametrize("package", FAMILIES)
def test_every_row_has_a_case(package):
    table = FAMILIES[package][0]
    rows = set(getattr(importlib.import_module(package), table))
    cased: set[str] = set()
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != Path(__file__).name and (table in text or package in text):
            constants = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
            cased |= {node.value for node in constants if isinstance(node.value, str)}
    assert rows <= cased, f"no case for {sorted(rows - cased)}"


@pytest.mark.parametrize("package", FAMILIES)
def test_members_of_a_family_do_not_import_each_other(package):
    kinds = getattr(importlib.import_module(package), FAMILIES[package][0]).values()
    files = {kind.__module__ for kind in kinds}
    for kind in kinds:
        above = {ancestor.__module__ for ancestor in kind.__mro__}  # a narrower kind of another may extend it
        name = kind.__module__.removeprefix("hildanext.").replace(".", "/") + ".py"
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in files - above, f"{name} imports {node.module}"


@pytest.mark.parametrize("module", PROMISED)
def test_promised_names_are_there(module):
    imported = importlib.import_module(module)
    assert [name for name in PROMISED[module] if not hasattr(imported, name)] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_two_functions(verb):
    module = importlib.import_module(VERBS[verb][0])
    assert callable(module.configure) and callable(module.run)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_two_functions(stage):
    module = importlib.import_module(STAGES[stage])
    assert callable(module.stage) and callable(module.check)


def fresh_python(code: str) -> tuple[str, float]:
    """The last line a new interpreter prints, and its processor seconds, which a busy machine does not stretch."""
    code += "; import time; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, answer, seconds = done.stdout.strip().splitlines()
    return answer, float(seconds)


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["run", "--help"], ["generate", "--help"]])
def test_help_loads_no_torch_and_answers_in_half_a_second(arguments):
    code = f"import sys, hildanext.cli; hildanext.cli.main({arguments!r}); print('torch' in sys.modules)"
    answers = [fresh_python(code) for _ in range(3)]
    assert {answer for answer, _ in answers} == {"False"}
    assert min(seconds for _, seconds in answers) < 0.5


def test_importing_the_package_loads_no_torch():
    assert fresh_python("import sys, hildanext; print('torch' in sys.modules)")[0] == "False"


def test_the_help_of_no_verb_loads_what_takes_long():
    code = (
        "import sys, hildanext.cli as cli; slow = {'torch', 'transformers', 'pydantic', 'numpy'}; "
        "print({verb: here for verb in cli.VERBS "
        "if cli.main([verb, '--help']) or (here := slow & set(sys.modules))})"
    )
    assert fresh_python(code)[0] == "{}"


HEAVY = (
    "torch transformers accelerate peft tokenizers safetensors datasets huggingface_hub numpy matplotlib pydantic "
    "fastapi starlette uvicorn httpx rich psutil sqlite3 asyncio subprocess urllib.request importlib.metadata "
    "dataclasses"
).split()
"""What takes 5 ms or more of a start-up, whose own 40 have room for none: `dataclasses` loads `inspect`,
`importlib.metadata` loads `email`."""

LATE = {
    ("data/sources/chat/problem_answers.py", "hildanext.data.problems"): "a circle: some problems are conversations",
    ("data/sources/chat/problem_answers.py", "hildanext.data.problems.base"): "the same circle",
    ("engine/dinfer/config.py", "hildanext.engine.dinfer.probe"): "a circle: the probe is of this configuration",
    ("export/onnx_export.py", "hildanext.export.onnx_file"): "onnx is an extra, which the runtime does without",
}
"""Imports inside functions that save no start-up, and why they are there."""


def loaded_by(node: ast.Import | ast.ImportFrom) -> set[str]:
    """What an import loads itself: files below the package, other modules by name."""
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [str(node.module), *(f"{node.module}.{name}" for name in names)]
    loaded = set()
    for parts in (name.split(".") for name in names):
        for end in range(1, len(parts) + 1):
            path = "/".join(parts[1:end])
            files = {f"{path}.py", f"{path}/__init__.py".lstrip("/")} & set(TREES)
            loaded |= files if parts[0] == "hildanext" else {".".join(parts[:end])}
    return loaded


def heavy_of(start: set[str]) -> set[str]:
    """What of `HEAVY` is loaded with these, by what they import at their top."""
    seen, waiting = set(), list(start)
    while waiting:
        name = waiting.pop()
        if name in TREES and name not in seen:
            packages = [f"{parent}/__init__.py".removeprefix("./") for parent in Path(name).parents]
            tops = [node for node in TREES[name].body if isinstance(node, ast.Import | ast.ImportFrom)]
            waiting += [*(set(packages) & set(TREES)), *(below for node in tops for below in loaded_by(node))]
        seen.add(name)
    return seen & set(HEAVY)


@pytest.mark.parametrize("name", NAMES)
def test_an_import_inside_a_function_saves_something_at_start_up(name):
    at_top = heavy_of({name})
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in (node for function in functions for node in ast.walk(function)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hildanext"):
            late = heavy_of(loaded_by(node)) - at_top or (name, node.module) in LATE
            assert late, f"{name}:{node.lineno}: {ast.unparse(node)} belongs to the top of the file"
