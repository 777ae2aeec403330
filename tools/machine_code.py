"""What the compilers made of the kernels, for every architecture: ``python -m tools.machine_code``.

python -m tools.machine_code [cuda | triton] [--arch 90 ...] [--head-dim 48 ...] [--write]

Needs no GPU. The CUDA kernels are read from the built library (``make extension``), Triton's are compiled for it
(minutes). ``--write`` makes tests/budget.txt anew, which the tests hold every kernel to.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gpsa_kernels.backends.cuda import FOLDER

LIBRARY = FOLDER / "gpsa_cuda.so"
BUDGET = Path(__file__).parents[1] / "tests" / "budget.txt"
ARCHITECTURES = (80, 90, 100, 120)


class Code(NamedTuple):
    """One kernel for one architecture. Instructions are counted in the code, loops once."""

    registers: int  # of a thread
    spills: int  # bytes of a thread's registers kept in local memory
    shared: int  # bytes of a block, where the compiler knows them: Triton's
    matrix: int  # instructions of the tensor cores
    ldmatrix: int
    exponentials: int
    wide: int  # accesses of global memory, 16 bytes a thread
    scalar: int  # of 4 or 8 bytes a thread: parameters, statistics
    narrow: int  # asynchronous copies of less than 16 bytes a thread: as slow as wide ones
    other: int  # any other access
    atomics: int
    instructions: int


Kernels = dict[tuple[str, str], Code]  # by architecture ("sm_90") and name

_KINDS = {
    "matrix": r"HMMA|HGMMA|UTC[HOQ]MMA|DMMA",
    "ldmatrix": r"LDSM",
    "exponentials": r"MUFU\.EX2",
    "wide": r"(LDG|STG|LDGSTS)\b.*\.128",
    "scalar": r"(LDG|STG)\.E(\.64)?(\.CONSTANT)?$",
    "narrow": r"LDGSTS\b",
    "other": r"(LDG|STG|LDGSTS|LD|ST)\b",
    "atomics": r"RED(?!UX)|ATOM",
}
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*)", re.MULTILINE)
_FUNCTION = re.compile(r"^(?:arch = (\w+)|\s+Function :? ?(\S+?):?$)", re.MULTILINE)
_BUDGETED = Code._fields[:-1]  # the length of the code is free
_LEGEND = f"# {' '.join(_BUDGETED)}: one figure, or each of {'/'.join(f'sm_{code}' for code in ARCHITECTURES)}; then 0"


def tool() -> str:
    """Where ``cuobjdump`` is.

    Raises:
        FileNotFoundError: nowhere.
    """
    places = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    if (triton := find_spec("triton")) is not None:
        places += [f"{folder}/backends/nvidia/bin" for folder in triton.submodule_search_locations or ()]
    found = shutil.which("cuobjdump", path=os.pathsep.join(places))
    if found is None:
        raise FileNotFoundError("cuobjdump was found neither in the CUDA toolkit nor in triton")
    return found


@functools.cache
def kind(instruction: str) -> str | None:
    """Which of :class:`Code`'s counts an instruction belongs to: the first that fits."""
    return next((name for name, pattern in _KINDS.items() if re.match(pattern, instruction)), None)


def read(binary: Path = LIBRARY) -> Kernels:
    """Every kernel in a library or cubin.

    Raises:
        FileNotFoundError: ``cuobjdump`` is not installed.
        subprocess.CalledProcessError: it cannot read the file.
    """
    resources = functions(binary, "-res-usage")
    codes = {}
    for key, text in functions(binary, "-sass").items():
        counts = Counter(kind(words.split()[0]) for _, words in _INSTRUCTION.findall(text))
        usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", resources[key])}
        codes[key] = Code(
            registers=usage["REG"],
            spills=usage["STACK"] + usage["LOCAL"],
            shared=usage["SHARED"],
            **{name: counts[name] for name in _KINDS},
            instructions=counts.total(),
        )
    names = _readable(name for _, name in codes)
    return {(architecture, names[name]): code for (architecture, name), code in codes.items()}


def in_loops(text: str) -> list[str]:
    """The instructions of a kernel, as ``cuobjdump`` prints it, between a branch backwards and where it leads."""
    code = [(int(address, 16), words) for address, words in _INSTRUCTION.findall(text)]
    branches = [(address, re.match(r"BRA\b.*?\b0x([0-9a-f]+)", words)) for address, words in code]
    loops = [(int(found[1], 16), address) for address, found in branches if found and int(found[1], 16) < address]
    return [words for address, words in code if any(start <= address <= end for start, end in loops)]


def functions(binary: Path, option: str) -> dict[tuple[str, str], str]:
    """What ``cuobjdump`` prints of each kernel, by architecture and mangled name."""
    dumped = subprocess.run([tool(), option, binary], check=True, capture_output=True, text=True).stdout
    pieces = _FUNCTION.split(dumped)
    texts, architecture = {}, ""
    for new_architecture, function, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        architecture = new_architecture or architecture
        if function:
            texts[architecture, function] = text
    return texts


def _readable(mangled: Iterable[str]) -> dict[str, str]:
    """``gpsa_kernel<WholeImageBackward<Half, 48, true>>`` of a mangled name."""
    names = list(dict.fromkeys(mangled))
    plain = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    short = re.sub(r"(?m)\(anonymous namespace\)::|gpsa::|^void |\(.*\)$", "", plain).replace("> >", ">>")
    return dict(zip(names, short.splitlines(), strict=True))


def without_twins(kernels: Kernels) -> Kernels:
    """Without the float16 kernels that have their bfloat16 twin's figures, but for the length of the code."""
    twins = {key: kernels[key[0], key[1].replace("Half", "Bfloat16")] for key in kernels}
    return {key: code for key, code in kernels.items() if "Half" not in key[1] or code[:-1] != twins[key][:-1]}


def render(kernels: Kernels) -> str:
    """A heading for kernels whose names begin alike, under it a line each: how its name ends, its figures; -1 registers
    on an architecture that it is not for."""
    lines = [_LEGEND]
    for name in sorted({name for _, name in kernels}):
        heading, rest = re.findall(r"^(.*?(?:float\d+|Half)[^\d ]*|\w+)(.*)", name)[0]
        if heading not in lines:
            lines.append(heading)
        known = [kernels.get((f"sm_{code}", name)) for code in ARCHITECTURES]
        some = next(filter(None, known))
        figures = zip(*((code or some._replace(registers=-1))[: len(_BUDGETED)] for code in known), strict=True)
        cells = ["/".join(map(str, values if len(set(values)) > 1 else values[:1])) for values in figures]
        lines.append(re.sub("( 0)*$", "", f"{rest}: {' '.join(cells)}"))
    return "\n".join(lines) + "\n"


def parse(text: str) -> Kernels:
    """The reverse of :func:`render`."""
    kernels, heading = {}, ""
    for line in text.splitlines()[1:]:
        rest, _, figures = line.partition(": ")
        if not figures:
            heading = line
            continue
        for index, architecture in enumerate(ARCHITECTURES):
            values = [int((cell.split("/") * len(ARCHITECTURES))[index]) for cell in figures.split()]
            code = Code(*values, *[0] * (len(Code._fields) - len(values)))
            if code.registers >= 0:
                kernels[f"sm_{architecture}", heading + rest] = code
    return kernels


def over_budget(kernels: Kernels, budget: Kernels) -> dict[str, tuple[int, int]]:
    """What takes more than the budget gives: the figure, and its budget. The length of the code is free."""
    return {
        f"{architecture} {name}: {figure}": (value, allowed)
        for (architecture, name), code in kernels.items()
        for figure, value, allowed in zip(_BUDGETED, code, budget[architecture, name], strict=False)
        if value > allowed
    }


def table(kernels: Kernels) -> str:
    """For a person to read: a line a kernel and architecture, under a heading."""
    width = max((len(name) for _, name in kernels), default=0) + 8
    lines = [" " * width + "".join(f"{field:>13}" for field in Code._fields)]
    for (architecture, name), code in kernels.items():
        lines.append(f"{architecture:<8}{name:<{width - 8}}" + "".join(f"{value:>13}" for value in code))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.machine_code", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("compiler", nargs="?", choices=("cuda", "triton"), help="both, if not given")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="80 for sm_80, ...")
    parser.add_argument("--head-dim", type=int, nargs="+", default=(32, 48, 64, 128), help="of Triton's kernels")
    parser.add_argument("--library", type=Path, default=LIBRARY, help="of the CUDA kernels")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {BUDGET.name}")
    options = parser.parse_args(arguments)
    compilers = [options.compiler] if options.compiler else ["cuda", "triton"]
    found: Kernels = {}
    if "cuda" in compilers:
        found |= read(options.library)
    if "triton" in compilers:
        from tools import ahead_of_time

        found |= ahead_of_time.measure_all(ahead_of_time.variants(options.arch, options.head_dim))
    chosen = {key: code for key, code in found.items() if key[0] in {f"sm_{code}" for code in options.arch}}
    print(table(chosen))
    if options.write:
        known = parse(BUDGET.read_text()) if BUDGET.exists() else {}
        renewed = {(f"sm_{code}", compiler) for code in options.arch for compiler in compilers}
        kept = {key: code for key, code in known.items() if (key[0], compiler_of(key[1])) not in renewed}
        BUDGET.write_text(render(kept | without_twins(chosen)))


def compiler_of(name: str) -> str:
    """Which compiler a kernel is from: the CUDA kernels are templates."""
    return "cuda" if "<" in name else "triton"


if __name__ == "__main__":
    main()
