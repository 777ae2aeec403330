"""The dropout mask that all CUDA kernels draw: Philox, its rate, and that nothing but its coordinates decides."""

import ctypes
import itertools
import math

import emulation
import pytest
import torch

from gpsa_kernels.backends import cuda
from gpsa_kernels.backends.base import Call

# of the reference implementation's known-answer tests for philox4x32-10: counter, key, words
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox(counter, key):
    words = (ctypes.c_uint32 * 4)(*counter)
    emulation.kernels().philox_words(words, (ctypes.c_uint32 * 2)(*key))
    return list(words)


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_answers(counter, key, words):
    assert philox(counter, key) == words


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("seed", "batch_head"), [(0, 0), (-5, 3), (2**40 + 1, 2**33 + 2)])
def test_both_orientations_draw_the_same_mask(transposed, seed, batch_head):
    """One draw for (i, j), (i, j + 8), (i + 8, j), (i + 8, j + 8), by the definition."""
    mask = emulation.dropout_mask((3, 7), 0.25, seed, batch_head, transposed)
    for i, j in itertools.product(range(21), repeat=2):
        counter = [i - i % 16 + i % 8, j - j % 16 + j % 8, batch_head & 0xFFFFFFFF, batch_head >> 32]
        words = philox(counter, [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
        assert mask[i, j] == (words[i // 8 % 2 * 2 + j // 8 % 2] >= 0.25 * 2**32)


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(dropout_p):
    kept = emulation.dropout_mask((16, 16), dropout_p, 7, 1, False).double()
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * deviation / 256
    for step in (1, 8):  # neighbours, and what one draw decides together, are independent
        for a, b in ((kept[step:], kept[:-step]), (kept[:, step:], kept[:, :-step])):
            covariance = ((a - (1 - dropout_p)) * (b - (1 - dropout_p))).mean()
            assert abs(covariance) < 5 * deviation**2 / math.sqrt(a.numel())


@pytest.mark.parametrize("row_blocks", [0, 1], ids=["tiled", "whole image"])
def test_the_kernels_draw_this_mask(row_blocks):
    """Read off maps whose entries are all 1 / N, with the last 64 columns of the identity for V."""
    flat, seed = torch.zeros(2, 2, 70, 64, dtype=torch.float16), -7
    columns = torch.eye(70, dtype=torch.float16)[:, 6:].contiguous().expand_as(flat)
    call = Call(flat, flat, columns, torch.zeros(2, 3), torch.zeros(2), torch.tensor([seed]), 5, 14, 1.0, 0.3)
    with emulation.using(row_blocks=row_blocks):
        out = cuda.forward(call, False).out
    for batch_head, got in enumerate(out.flatten(0, 1)):
        assert torch.equal(got != 0, emulation.dropout_mask((5, 14), 0.3, seed, batch_head, False)[:, 6:] != 0)
