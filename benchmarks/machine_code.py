"""What nvcc made of the CUDA kernels, read from the library: ``python -m benchmarks.machine_code``.

Needs no GPU: ``cuobjdump`` of the CUDA toolkit, or the one that comes with Triton, and ``c++filt``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gpsa_kernels.backends.cuda import FOLDER

LIBRARY = FOLDER / "gpsa_cuda.so"


class Code(NamedTuple):
    """One kernel for one architecture. Instructions are counted in the code, loops once."""

    registers: int  # of a thread
    spills: int  # bytes of a thread's registers kept in local memory
    matrix_instructions: int
    ldmatrix: int
    exponentials: int
    wide_accesses: int  # of global memory, 16 bytes a thread
    scalar_accesses: int  # of global memory, 4 or 8 bytes a thread: parameters, statistics
    other_accesses: int  # of global memory
    atomics: int
    instructions: int


_KINDS = {
    "matrix_instructions": r"HMMA|HGMMA|UTCHMMA",
    "ldmatrix": r"LDSM",
    "exponentials": r"MUFU\.EX2",
    "wide_accesses": r"(LDG|STG|LDGSTS)\b.*\.128",
    "scalar_accesses": r"(LDG|STG)\.E(\.64)?(\.CONSTANT)?$",
    "other_accesses": r"(LDG|STG|LDGSTS|LD|ST)\b",
    "atomics": r"RED|ATOM",
}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)


def tool() -> str:
    """Where ``cuobjdump`` is.

    Raises:
        FileNotFoundError: nowhere.
    """
    places = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(places))
    if found is None:
        raise FileNotFoundError("cuobjdump was found neither in the CUDA toolkit nor in triton")
    return found


def kind(instruction: str) -> str | None:
    """Which of :class:`Code`'s counts an instruction belongs to: the first that fits."""
    return next((name for name, pattern in _KINDS.items() if re.match(pattern, instruction)), None)


def read(library: Path = LIBRARY) -> dict[tuple[str, str], Code]:
    """(architecture, kernel) -> what it takes, for every kernel in the library.

    Raises:
        FileNotFoundError: ``cuobjdump`` is not installed.
        subprocess.CalledProcessError: it cannot read the library.
    """
    resources = {
        key: {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        for key, text in _functions(library, "-res-usage", r" Function (\S+):$")
    }
    codes = {}
    for key, text in _functions(library, "-sass", r"\t\tFunction : (\S+)$"):
        instructions = _INSTRUCTION.findall(text)
        counts = Counter(kind(instruction) for instruction in instructions)
        usage = resources[key]
        codes[key] = Code(
            registers=usage["REG"],
            spills=usage["STACK"] + usage["LOCAL"],
            **{name: counts[name] for name in _KINDS},
            instructions=len(instructions),
        )
    return dict(sorted(codes.items()))


def _functions(library: Path, option: str, heading: str) -> Iterator[tuple[tuple[str, str], str]]:
    """What ``cuobjdump`` prints of each kernel: ((architecture, readable name), text)."""
    dumped = subprocess.run([tool(), option, library], check=True, capture_output=True, text=True).stdout
    pieces = re.split(rf"(?m)^(?:arch = (\w+)|{heading})", dumped)
    architecture = ""
    for new_architecture, function, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if new_architecture:
            architecture = new_architecture
        else:
            yield (architecture, _readable(function)), text


def _readable(mangled: str) -> str:
    """``whole_image_forward<WholeImage<Half, 48, 13>>`` of a mangled name."""
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|gpsa::|^void |\(.*\)$", "", name).replace("> >", ">>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path, nargs="?", default=LIBRARY)
    parser.add_argument("--json", type=Path, help="write the figures here too: the budget of tests/cuda")
    options = parser.parse_args()
    codes = read(options.library)
    titles = [name.removesuffix("_instructions").removesuffix("_accesses") for name in Code._fields]
    print(f"{'kernel':<70}" + "".join(f"{title:>13}" for title in titles))
    for (architecture, kernel), code in codes.items():
        print(f"{architecture + ' ' + kernel:<70}" + "".join(f"{value:>13}" for value in code))
    if options.json:
        figures = {" ".join(key): code._asdict() for key, code in codes.items()}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
