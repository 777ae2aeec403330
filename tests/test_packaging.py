"""The wheel without the CUDA library: pure Python, typed, and nothing in it or behind it that is not needed."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import gpsa_kernels
from tools.wheel import problems

ROOT = Path(__file__).parent.parent


def test_torch_is_the_only_requirement():
    needed = [r for r in requires("gpsa-kernels") or [] if "extra ==" not in r]
    assert needed == ["torch>=2.10"]
    assert version("gpsa-kernels") == gpsa_kernels.__version__


@pytest.fixture
def source(tmp_path):
    """What the project is built from, and nothing that was built."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("gpsa_kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_wheel_is_pure_python_and_typed(source):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(build, check=True, cwd=source, env={"PATH": "", "GPSA_BUILD_CUDA": "0"})
    (wheel,) = source.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "gpsa_kernels/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".cu", ".cpp", ".h"))]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gpsa_kernels"}
    # to be published it lacks the library, and nothing but that
    assert problems(wheel) == [f"gpsa_kernels/_cuda/{name} is missing" for name in ("build.json", "gpsa_cuda.so")]
    with zipfile.ZipFile(wheel, "a") as packed:
        packed.writestr("tests/test_packaging.py", "")
    assert problems(wheel)[2:] == ["tests/test_packaging.py does not belong in it"]


def test_the_source_distribution_has_what_the_library_is_built_from(source):
    script = "from setuptools import build_meta; build_meta.build_sdist('.')"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=source, capture_output=True)
    (archive,) = source.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_file()} | {"setup.py"} <= names


def test_an_old_setuptools_is_refused_with_the_command_that_mends_it(tmp_path):
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\n")  # what the venv of Python 3.11 comes with
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "needs setuptools >= 77, and this environment has 65.5.0: pip install --upgrade setuptools" in done.stderr


def test_importing_loads_nothing_of_the_extras():
    extras = "{'timm', 'sklearn', 'matplotlib', 'tqdm', 'pytest', 'torch.distributed.tensor'}"
    script = "import sys, torch; before = set(sys.modules); import gpsa_kernels; "  # torch loads tqdm by itself
    script += f"print(*{extras} & sys.modules.keys() - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
