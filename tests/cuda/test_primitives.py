"""Every primitive of csrc/primitives.h against its documented meaning, written down here once more in tensors."""

import math
import shutil
import subprocess
from pathlib import Path

import emulation
import pytest
import torch

HERE = Path(__file__).parent
DTYPES = [torch.float16, torch.bfloat16]
LANE = torch.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4 * 2
BLOCKS_X, BLOCKS_Y, WARPS = 2, 3, 3


@pytest.fixture(scope="module", params=["emulator", "device"])
def program(request, tmp_path_factory):
    """The conformance program, for the emulator or for a GPU."""
    source = HERE / "conformance.cu"
    if request.param == "emulator":
        includes = [emulation.CSRC, emulation.EMULATOR]
        return emulation.built([source, emulation.EMULATOR / "emulator.cpp"], [], includes, [])
    if not torch.cuda.is_available():
        pytest.skip("no GPU: what the primitives do on one is not checked, only what they do on the emulator")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH: what the primitives do on this GPU is not checked")
    made = tmp_path_factory.mktemp("conformance") / "device"
    subprocess.run(["nvcc", "-std=c++17", "-arch=native", source, f"-I{emulation.CSRC}", "-o", made], check=True)
    return made


def run(program, matrices):
    """(block, warp, record, lane, word) of the program, int32."""
    name = str(matrices.dtype).removeprefix("torch.")
    words = subprocess.check_output([program, name], input=matrices.view(torch.int16).numpy().tobytes())
    return torch.frombuffer(bytearray(words), dtype=torch.int32).view(BLOCKS_Y * BLOCKS_X, WARPS, -1, 32, 4)


def floats(words):
    return words.contiguous().view(torch.float32)


def pairs(words, dtype):
    """The two 16-bit halves of each word, low first, in a new last dimension."""
    return words.contiguous().view(dtype).unflatten(-1, (-1, 2))


def is_close(got, expected, relative):
    return torch.allclose(got.double(), expected.double(), rtol=relative, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_primitives_do_what_is_documented(program, dtype):
    m = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = m.flatten()
    every = run(program, m)
    out = every[0, 0]
    alike = [n for n in range(out.size(0)) if n not in (8, 11, 12)]  # the other records say where they come from
    assert torch.equal(every[:, :, alike], out[alike].expand_as(every[:, :, alike])), "another warp or block"
    by_rows = torch.stack([m[:, ROW, COLUMN], m[:, ROW, COLUMN + 1]], -1).transpose(0, 1)
    by_columns = torch.stack([m[:, COLUMN, ROW], m[:, COLUMN + 1, ROW]], -1).transpose(0, 1)
    assert torch.equal(pairs(out[0], dtype), by_rows), "ldmatrix.x4"
    assert torch.equal(pairs(out[1], dtype), by_columns), "ldmatrix.x4.trans"

    d = m.double()
    left = torch.cat([torch.cat([d[0], d[2]], 1), torch.cat([d[1], d[3]], 1)])
    right = torch.cat([d[0].mT, d[1].mT])
    product = left @ right
    expected = torch.stack(
        [product[ROW + 8 * part, COLUMN + i] + 1 + i + 2 * part for part in (0, 1) for i in (0, 1)], 1
    )
    # the hardware truncates its sums: one unit of the largest term and of each of 17 additions
    size = (left.abs() @ right.abs()).max() + 4
    assert (floats(out[2]).double() - expected).abs().max() <= 17 * 2**-23 * size, "mma"

    assert torch.equal(floats(out[3]), torch.stack([LANE ^ mask for mask in (1, 2, 8, 16)], 1).float()), "shuffle"

    x = flat[:64].view(32, 2)
    assert torch.equal(pairs(out[4, :, :1], dtype)[:, 0], x), "load_pair"
    assert torch.equal(floats(out[4, :, 1:3]), x.float()), "unpack"
    assert torch.equal(pairs(out[4, :, 3:], dtype)[:, 0], x), "pack"
    assert torch.equal(pairs(out[5, :, :1], dtype)[:, 0], (x.float() / 3).to(dtype)), "pack rounds to nearest"
    extremes = torch.stack([x[:, 1].float() * 1e30, x[:, 0].float() * 1e-30], 1).to(dtype)
    assert torch.equal(pairs(out[5, :, 1:2], dtype)[:, 0], extremes), "pack overflows and underflows"
    assert torch.equal(floats(out[5, :, 2]), x.float().amax(1)), "maximum"
    assert torch.equal(floats(out[5, :, 3]), x[:, 0].float()), "maximum passes NaN over"

    assert is_close(floats(out[6, :, :2]), x.double().exp2(), 2**-22), "exp2"
    assert floats(out[6, :, 2:]).eq(0).all(), "exp2 of -inf, and of what would be subnormal"
    logs = floats(out[7])
    assert (logs[:, 0].double() - x[:, 0].double().square().log2()).abs().max() <= 2**-20, "log2"
    assert is_close(logs[:, 1], (1 + LANE.double()).log2(), 2**-21), "log2"
    assert logs[:, 2].eq(-math.inf).all(), "log2 of 0"
    assert out[7, :, 3].eq(1).all(), "any_lane, kept"

    threads = torch.arange(WARPS * 32)
    assert every[:, :, 8, :, 0].flatten(1).view(torch.float32).eq(threads.flip(0)).all(), "sync_block"
    rows = flat.view(32, 8).clone()
    rows[1::2] = 0
    assert torch.equal(out[9].contiguous().view(dtype), rows), "cp.async with zero fill"
    assert torch.equal(pairs(out[10, :, :1], dtype)[:, 0], torch.stack([LANE, LANE + 1], 1).to(dtype)), "store_pair"
    reversed_rows = flat.view(32, 8).flip(0)[:, [0, 1, 2, 3, 6, 7]]
    assert torch.equal(pairs(out[10, :, 1:], dtype).flatten(1), reversed_rows), "chunks"

    everywhere = torch.zeros(BLOCKS_Y * BLOCKS_X, WARPS * 32, dtype=torch.int64)
    where = [threads, WARPS * 32, threads % 32, threads // 32]
    for n, name in enumerate(("thread", "threads", "lane", "warp")):
        assert torch.equal(every[:, :, 11, :, n].flatten(1).long(), everywhere + where[n]), name
    blocks = torch.arange(BLOCKS_Y * BLOCKS_X)[:, None]
    assert torch.equal(every[:, :, 12, :, 0].flatten(1).long(), everywhere + blocks % BLOCKS_X), "block_x"
    assert torch.equal(every[:, :, 12, :, 1].flatten(1).long(), everywhere + blocks // BLOCKS_X), "block_y"
    assert torch.equal(out[12, :, 2:].contiguous().view(dtype), flat[:128].view(32, 4)), "load of int64"
    assert torch.equal(out[13, :, :1].contiguous().view(dtype), flat[:64].view(32, 2)), "load of float"
    assert torch.equal(floats(out[13, :, 1:]), torch.stack([LANE + n for n in (1, 2, 3)], 1).float()), "store of float"
    reciprocals = floats(out[14])
    assert is_close(reciprocals[:, 0], 1 / x[:, 0].double(), 2**-22), "reciprocal"
    assert reciprocals[:, 1:3].eq(0).all(), "reciprocal of infinity, and where it would be subnormal"
    assert reciprocals[:, 3].eq(math.inf).all(), "reciprocal of 0"


UNCHECKED = ["*shared", "shared[0]", "*global", "global[0]", "*global.pointer", "shared.address"]


@pytest.mark.parametrize("access", [*UNCHECKED, "load(gpsa::Shared<float>(0))"])
def test_an_access_that_bypasses_the_checks_does_not_compile(access):
    code = f"""
        #include "primitives.h"
        float f(gpsa::Shared<float> shared, gpsa::Global<const float> global) {{
            load(shared);
            load(global);
            return {access};
        }}"""
    command = ["g++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    command += [f"-I{emulation.CSRC}", f"-I{emulation.EMULATOR}"]

    def compiles(source):
        return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0

    assert compiles(code.replace(f"return {access}", "return 0"))
    assert not compiles(code)
