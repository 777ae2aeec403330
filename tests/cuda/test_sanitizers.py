"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import re

import emulation
import pytest


def test_the_kernels_are_clean():
    done = emulation.run_exercise(emulation.CSRC, *emulation.SANITIZED)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("whole_image_forward.cu", "Sum scores[2 * key_tiles{+ - 1+}"),
        ("whole_image_backward.cu", "Sum mixed[2][2{+ - 1+}"),
        ("tiled_forward.cu", "Sum entries[2{+ - 1+}"),
        ("tiled_backward.cu", "Sum sums[channels / 8{+ - 1+}"),
        ("tiled_position.cuh", "Sum sums[channels / 8{+ - 1+}"),
    ],
)
def test_an_accumulator_too_few_is_caught(tmp_path, file, change):
    done = emulation.run_exercise(emulation.changed_sources(tmp_path, file, change), *emulation.SANITIZED)
    assert done.returncode != 0
    caught = re.search("AddressSanitizer: stack-buffer-overflow|index \\d+ out of bounds", done.stderr)
    assert caught, (done.returncode, done.stderr[-2000:])
