"""The layers of the library: a module imports from lower layers and from its own folder, and nothing runs in circles.

The rule is read off the syntax trees, so imports inside functions and under ``TYPE_CHECKING`` count, and so do modules
that are named by a string, as for ``importlib.import_module``.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest
from checkout import CHECKOUT

LAYERS = (
    ("numerics", "schedule", "files"),
    ("reference", "kernels", "eager", "data"),
    ("ops",),
    ("nn", "hf", "torchtitan"),
    ("model",),
    ("training",),
    ("experiment",),
    ("cli", "__init__"),
    ("__main__",),
)
LAYER_OF = {member: number for number, layer in enumerate(LAYERS) for member in layer}
LONGEST_FUNCTION = 60  # lines of code


def sources() -> dict[str, str]:
    """The text of every module by its dotted name; the package's own is ``patchkernels.__init__``."""
    folders = {"patchkernels": CHECKOUT / "patchkernels", "patchkernels.kernels": CHECKOUT / "kernels"}
    found = {}
    for package, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if package != "patchkernels" or parts[0] != "kernels":  # a symlink to the folder that is read by itself
                found[".".join((package, *parts))] = file.read_text(encoding="utf-8")
    return found


def imports(name: str, modules: dict[str, str]) -> set[str]:
    """The modules of the library that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(modules[name])):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = [node.value] if node.value.startswith("patchkernels.") and node.value in modules else []
        else:
            continue
        found |= {module for text in named if (module := resolve(text, modules))}
    return found - {name}


def resolve(text: str, modules: dict[str, str]) -> str | None:
    """The module that a dotted name stands for, or whose member it is; None if it is none of the library's."""
    if text != "patchkernels" and not text.startswith("patchkernels."):
        return None
    parent = text.rpartition(".")[0]
    candidates = (text, f"{text}.__init__", parent, f"{parent}.__init__")
    return next((module for module in candidates if module in modules), None)


def complaints(modules: dict[str, str]) -> list[str]:
    """Imports that break the layer rule, and a circle if there is one."""
    graph = {name: imports(name, modules) for name in modules}
    found = []
    for name, imported in graph.items():
        folder = name.split(".")[1]
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
    assert complaints(modules) == []


@pytest.mark.parametrize(
    ("name", "line", "complaint"),
    [
        ("patchkernels.ops.targets", "from patchkernels.model.config import PatchLMConfig", "not of a lower layer"),
        ("patchkernels.eager.cross_entropy", "from patchkernels.data import corpus", "not of a lower layer"),
        ("patchkernels.nn", "def f():\n    from patchkernels.hf import enable", "not of a lower layer"),
        ("patchkernels.data.corpus", "import patchkernels", "not of a lower layer"),
        ("patchkernels.files", "from patchkernels.schedule import Phase", "not of a lower layer"),
        ("patchkernels.kernels.cross_entropy", "import patchkernels.ops.backend", "not of a lower layer"),
        ("patchkernels.ops.vocab_shard", "module = 'patchkernels.training.log'", "not of a lower layer"),
        ("patchkernels.ops.targets", "def f():\n    import patchkernels.ops.linear_patch_cross_entropy", "a circle"),
    ],
)
def test_a_forbidden_import_is_found(name, line, complaint):
    modules = sources()
    modules[name] += f"\n{line}\n"
    (found,) = complaints(modules)
    assert complaint in found and name in found


def lines_of_code(text: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines that hold code: no docstring, no comment, no blank line."""
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


def test_files_have_one_place():
    """What is fixed from outside: the symlink, and no module beside the folders that the layers name."""
    beside = {path.stem for path in (CHECKOUT / "patchkernels").glob("*.py")}
    assert beside <= LAYER_OF.keys()
    assert not list(Path(CHECKOUT).glob("conftest.py"))
