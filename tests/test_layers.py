"""The layers of the library: a module imports from lower layers and from its own folder, without circles.

The rule is checked on the syntax trees. So imports inside functions and under ``TYPE_CHECKING`` count, and modules that
are named by a string too, as for ``importlib.import_module``.
"""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest
from checkout import CHECKOUT

LAYERS = (
    ("numerics", "schedule", "files"),
    ("kernels", "eager", "data"),
    ("ops",),
    ("nn", "hf", "torchtitan"),
    ("model",),
    ("training",),
    ("experiment",),
    ("cli", "__init__", "reference"),  # the reference is for tests and benchmarks: nothing in the library imports it
    ("__main__",),
)
OUTSIDE = ("bench", "examples", "kernels", "tests")  # top-level names of a checkout, which no installation has
LAYER_OF = {member: number for number, layer in enumerate(LAYERS) for member in layer}
LONGEST_FUNCTION = 60  # lines of code


def sources() -> dict[str, str]:
    """The text of every module by its dotted name. That of the package itself is ``patchkernels.__init__``."""
    folders = {"patchkernels": CHECKOUT / "patchkernels", "patchkernels.kernels": CHECKOUT / "kernels"}
    found = {}
    for package, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if package != "patchkernels" or parts[0] != "kernels":  # a symlink to a folder that is read separately
                found[".".join((package, *parts))] = file.read_text(encoding="utf-8")
    return found


def imports(name: str, modules: dict[str, str]) -> set[str]:
    """The modules of the library that a module imports."""
    found = {resolve(text, modules) for text in imported_names(modules[name])}
    return {module for module in found if module} - {name}


def imported_names(text: str) -> set[str]:
    """The dotted names that a module imports, and the strings in it that could be such names."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if re.fullmatch(r"patchkernels(\.\w+)+", node.value) else set()
    return names


def resolve(text: str, modules: dict[str, str]) -> str | None:
    """The library's module that a dotted name refers to, directly or by a member; None if there is no such module."""
    if text != "patchkernels" and not text.startswith("patchkernels."):
        return None
    parent = text.rpartition(".")[0]
    candidates = (text, f"{text}.__init__", parent, f"{parent}.__init__")
    return next((module for module in candidates if module in modules), None)


def violations(modules: dict[str, str]) -> list[str]:
    """A message for each import that breaks the layer rule, and for a circle if there is one."""
    graph = {name: imports(name, modules) for name in modules}
    found = []
    for name, imported in graph.items():
        folder = name.split(".")[1]
        outside = {text.split(".")[0] for text in imported_names(modules[name])} & set(OUTSIDE)
        found += [f"{name} imports {other}, which is not installed" for other in sorted(outside)]
        for other in sorted(imported):
            other_folder = other.split(".")[1]
            if folder != other_folder and LAYER_OF[other_folder] >= LAYER_OF[folder]:
                found.append(f"{name} imports {other}, which is not of a lower layer")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("a circle: " + " -> ".join(error.args[1]))
    return found


def test_modules_import_from_lower_layers_and_not_in_circles():
    modules = sources()
    assert {name.split(".")[1] for name in modules} == LAYER_OF.keys()
    assert violations(modules) == []


@pytest.mark.parametrize(
    ("name", "line", "violation"),
    [
        ("patchkernels.ops.targets", "from patchkernels.model.config import PatchLMConfig", "not of a lower layer"),
        ("patchkernels.eager.cross_entropy", "from patchkernels.data import corpus", "not of a lower layer"),
        ("patchkernels.nn", "def f():\n    from patchkernels.hf import enable", "not of a lower layer"),
        ("patchkernels.data.corpus", "import patchkernels", "not of a lower layer"),
        ("patchkernels.files", "from patchkernels.schedule import Phase", "not of a lower layer"),
        ("patchkernels.kernels.cross_entropy", "import patchkernels.ops.backend", "not of a lower layer"),
        ("patchkernels.ops.vocab_shard", "module = 'patchkernels.training.log'", "not of a lower layer"),
        ("patchkernels.data.tokenizer", "importlib.import_module('patchkernels.model')", "not of a lower layer"),
        ("patchkernels.ops.targets", "from patchkernels import reference", "not of a lower layer"),
        ("patchkernels.kernels.patch_embedding", "import kernels.cross_entropy", "imports kernels"),
        ("patchkernels.hf.rows", "def f():\n    from bench.peers import Missing", "imports bench"),
        ("patchkernels.ops.targets", "def f():\n    import patchkernels.ops.linear_patch_cross_entropy", "a circle"),
    ],
)
def test_a_forbidden_import_is_found(name, line, violation):
    modules = sources()
    modules[name] += f"\n{line}\n"
    (found,) = violations(modules)
    assert violation in found and name in found


def lines_of_code(text: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of lines that hold code, without docstring, comments and blank lines."""
    first, *_ = function.body
    docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    skipped = set(range(first.lineno, (first.end_lineno or 0) + 1)) if docstring else set()
    lines = enumerate(text.splitlines(), 1)
    code = {number for number, line in lines if line.strip() and not line.strip().startswith("#")}
    return len(code & set(range(function.lineno, (function.end_lineno or 0) + 1)) - skipped)


def test_no_function_is_longer_than_a_screen():
    lengths = {
        f"{name}.{node.name}": lines_of_code(text, node)
        for name, text in sources().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length >= LONGEST_FUNCTION} == {}
    assert len(lengths) > 200


def test_every_module_belongs_to_a_layer():
    """All modules in ``patchkernels`` belong to a layer, and there is no ``conftest.py`` in the root."""
    beside = {path.stem for path in (CHECKOUT / "patchkernels").glob("*.py")}
    assert beside <= LAYER_OF.keys()
    assert not list(Path(CHECKOUT).glob("conftest.py"))
