"""Checks wheels as whoever installs them meets them: what is in them, how large they are, and that they run.

python -m tools.wheel dist/*.whl                       # with the torch of this environment
python -m tools.wheel dist/*.whl --torch 2.10.0 2.11.0  # each from the package index, gigabytes with CUDA
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = {"gpsa_kernels/_cuda/gpsa_cuda.so", "gpsa_kernels/_cuda/build.json"}
LARGEST = 100e6  # bytes: what PyPI takes
RUN = """
import sys
import torch
import gpsa_kernels

assert gpsa_kernels.__file__.startswith(sys.prefix), f"{gpsa_kernels.__file__} is not of this environment"
q, k, v = torch.randn(3, 2, 3, 20, 8, requires_grad=True).unbind()
for backend in ("eager", "sdpa"):
    gpsa_kernels.gpsa_attention(q, k, v, torch.randn(3, 3), torch.randn(3), (4, 5), backend=backend).sum().backward()
"""


def problems(wheel: Path) -> list[str]:
    """What is wrong with the files in a wheel and with its size; nothing, if it can be published."""
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gpsa_kernels").rglob("*.py")}
    expected = modules | LIBRARY | {"gpsa_kernels/py.typed"}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not re.search(r"\.dist-info/|/$", name)}
    found = [f"{name} is missing" for name in sorted(expected - names)]
    found += [f"{name} does not belong in it" for name in sorted(names - expected)]
    if wheel.stat().st_size > LARGEST:
        found.append(f"it has {wheel.stat().st_size / 1e6:.0f} MB, and PyPI takes {LARGEST / 1e6:.0f}")
    return found


def install_and_run(wheel: Path, torch: str | None) -> str:
    """Runs the wheel in an environment of its own; what ``info`` says there of torch and of the CUDA library."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        if torch is None:
            (site,) = Path(folder).glob("lib/python*/site-packages")
            (site / "here.pth").write_text(str(Path(importlib.util.find_spec("torch").origin).parents[1]))
        needed = "--no-deps" if torch is None else f"torch=={torch}"
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, needed]
        subprocess.run(pip, check=True)
        subprocess.run([python, "-c", RUN], check=True, cwd=folder)
        info = [python, "-m", "gpsa_kernels", "info"]
        said = subprocess.run(info, check=True, cwd=folder, capture_output=True, text=True).stdout
        return "\n".join(line for line in said.splitlines() if line.startswith(("torch", "library", "cuda")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--torch", nargs="+", metavar="VERSION", default=[None])
    arguments = parser.parse_args()
    for wheel in arguments.wheels:
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        if found := problems(wheel):
            sys.exit("\n".join(found))
        for version in arguments.torch:
            print(install_and_run(wheel.resolve(), version))


if __name__ == "__main__":
    main()
