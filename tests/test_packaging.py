"""The installed package: it takes no name but its own, and is quick to import.

The environments here are empty ones that borrow torch from the running interpreter, so nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from checkout import CHECKOUT

BORROWED = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
NO_INDEX = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
SLOW_IMPORTS = {"accelerate", "datasets", "matplotlib", "rich", "tokenizers", "transformers", "triton", "tyro"}
STAND_IN = "a stand-in for the distribution named kernels"


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """Runs a command that must succeed, without this process's PYTHONPATH, and returns its output."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environ
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


class Environment:
    """A virtual environment that holds nothing but the packages that ``pip`` puts there."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=os.name == "posix")
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.site = Path(self("import sysconfig; print(sysconfig.get_path('purelib'))"))

    def pip(self, *arguments: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        run(*pip, cwd=self.folder, PYTHONPATH=os.pathsep.join(BORROWED))  # setuptools is needed to build

    def install(self, *what: str | Path) -> None:
        self.pip("install", "--ignore-installed", *NO_INDEX, *what)

    def __call__(self, code: str) -> str:
        return run(self.python, "-c", code, cwd=self.folder)

    def borrow(self) -> Environment:
        """Lets the environment import torch and the like. Directories named in a .pth file come last."""
        (self.site / "borrowed.pth").write_text("\n".join(BORROWED))
        return self


def build_wheel(source: Path, into: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", *NO_INDEX, "--wheel-dir", into, source, cwd=into)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that are built, because builds leave folders behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, folder)
    for name in ("kernels", "patchkernels"):
        shutil.copytree(CHECKOUT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with a top-level package ``kernels``, as Hugging Face's has."""
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(f"ORIGIN = {STAND_IN!r}\n")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "kernels"\nversion = "0.0.1"\n[tool.setuptools]\npackages = ["kernels"]\n'
    )
    return build_wheel(folder, tmp_path_factory.mktemp("stand_in_wheel"))


def test_wheel_holds_every_module_and_no_foreign_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {"patchkernels"}

    modules = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "patchkernels").rglob("*.py")}
    modules |= {f"patchkernels/kernels/{path.name}" for path in (CHECKOUT / "kernels").glob("*.py")}
    modules |= {"patchkernels/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == modules


def test_checkout_links_to_the_kernels() -> None:
    assert os.readlink(CHECKOUT / "patchkernels" / "kernels") == os.path.join("..", "kernels")


@pytest.mark.parametrize("kind", ["wheel", "plain", "editable"])
def test_installed(kind: str, wheel: Path, checkout: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install(*{"wheel": [wheel], "plain": [checkout], "editable": ["--editable", checkout]}[kind])
    found = environment("""if True:
        from importlib.metadata import entry_points, version
        from importlib.util import find_spec
        (script,) = entry_points(group="console_scripts", name="patchkernels")
        print(find_spec("kernels"), version("patchkernels"), script.value)
    """)
    assert found == "None 0.1.0 patchkernels.cli:main"  # a bare `import kernels` finds nothing

    found = environment.borrow()("import patchkernels.kernels; print(patchkernels.__file__)")
    home = checkout if kind == "editable" else environment.site
    assert Path(found) == home / "patchkernels" / "__init__.py"


@pytest.mark.parametrize("ours_first", [True, False])
def test_lives_beside_a_distribution_named_kernels(
    ours_first: bool, wheel: Path, stand_in: Path, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv")
    for distribution in (wheel, stand_in) if ours_first else (stand_in, wheel):
        environment.install(distribution)
    environment.borrow()
    both = "import kernels, patchkernels.kernels as ours; print(kernels.ORIGIN, ours.__name__, sep='\\n')"
    assert environment(both) == f"{STAND_IN}\npatchkernels.kernels"

    environment.pip("uninstall", "--quiet", "--yes", "patchkernels")
    assert environment("import kernels; print(kernels.ORIGIN)") == STAND_IN


def test_the_folder_in_a_checkout_refuses_to_be_kernels() -> None:
    code = "try: import kernels\nexcept ImportError as error: print(type(error).__name__, error)"
    refusal = run(sys.executable, "-c", code, cwd=CHECKOUT)
    assert refusal.startswith("ImportError ")
    assert "'patchkernels.kernels'" in refusal


def test_import_is_light() -> None:
    """Importing takes less than 0.3 s of one core beyond ``import torch``, best of three. No other test checks time."""
    code = """if True:
        import sys, time
        import torch
        before, start = set(sys.modules), time.process_time()
        import patchkernels
        seconds = time.process_time() - start
        print(seconds, *sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """
    seconds = []
    for _ in range(3):
        took, *imported = run(sys.executable, "-c", code, cwd=CHECKOUT).split()
        assert not SLOW_IMPORTS & set(imported)
        seconds.append(float(took))
    assert min(seconds) < 0.3
