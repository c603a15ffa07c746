"""Who may import whom, and how large things may grow."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import cryoai

ROOT = Path(cryoai.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
# A package without names of its own has nothing to list.
WITH_NAMES = sorted(
    name
    for name, path in MODULES.items()
    if name != "cryoai.__main__" and (path.stem != "__init__" or path.parent == ROOT)
)


# The commands that train.
COMMANDS = {f"cryoai.commands.{name}" for name in ("checking", "preparing", "refining", "running", "simulating")}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Modules of this package that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def importers_of(name):
    return {module for module, path in MODULES.items() if name in imports(path)}


def test_the_conventions_of_fourier_space_depend_on_nothing_here():
    assert imports(MODULES["cryoai.fourier"]) == set()
    assert imports(MODULES["cryoai.errors"]) == set()


def test_formats_know_only_formats_and_errors():
    for name, path in MODULES.items():
        if name.startswith("cryoai.formats."):
            assert all(i == "cryoai.errors" or i.startswith("cryoai.formats") for i in imports(path)), name


def test_reports_read_what_runs_wrote_and_run_nothing():
    for name, path in MODULES.items():
        if name.startswith("cryoai.report"):
            assert not {i for i in imports(path) if i.startswith("cryoai.training") or i == "cryoai.model"}, name


def test_only_the_trainer_and_the_command_line_know_the_settings():
    trainer = {f"cryoai.training.{name}" for name in ("building", "loop", "refining", "resuming")}
    assert importers_of("cryoai.training.settings") == {"cryoai", "cryoai.cli"} | COMMANDS | trainer


def test_only_the_entry_points_know_the_training():
    outside = {m for m in MODULES if not m.startswith("cryoai.training")}
    inner = [m for m in MODULES if m.startswith("cryoai.training.")]
    assert {m for name in inner for m in importers_of(name) & outside} == {"cryoai", "cryoai.cli"} | COMMANDS


def test_nothing_imports_the_command_line():
    assert importers_of("cryoai.cli") == {"cryoai.__main__"}
    commands = {name for name in MODULES if name.startswith("cryoai.commands.")}
    for name in commands:
        assert importers_of(name) <= commands | {"cryoai.cli"}, name


def test_imports_go_round_in_no_circle():
    remaining = {name: imports(path) - {name} for name, path in MODULES.items()}
    while remaining:
        free = {name for name, needs in remaining.items() if not needs & set(remaining)}
        assert free, f"circle among {sorted(remaining)}"
        remaining = {name: needs for name, needs in remaining.items() if name not in free}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_functions_stay_small_and_say_what_they_are(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    module = tree(path)
    assert ast.get_docstring(module)
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= first.end_lineno - first.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("name", WITH_NAMES)
def test_every_module_lists_what_it_offers(name):
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    for offered in module.__all__:
        value = getattr(module, offered)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), offered


def test_nothing_is_imported_from_a_module_that_it_does_not_offer():
    """Private helpers stay at home; tests may look in."""
    for name, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                assert not [
                    alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"
                ], name


def test_the_package_offers_what_it_imports():
    imported = {
        alias.name
        for node in tree(ROOT / "__init__.py").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(cryoai.__all__) == imported
