"""Which kernels launch_forward and launch_backward choose for a device, and with how many blocks and bytes."""

import emulation
import pytest
import torch
from emulation import H100, Device
from reference import inputs

from gpsa_kernels.backends import cuda
from gpsa_kernels.backends.base import Call

A100, B200 = Device(108, 163 * 1024), Device(148, 227 * 1024)
RTX_4090, RTX_5090 = Device(128, 99 * 1024), Device(170, 99 * 1024)
DEVICES = {"A100": A100, "H100": H100, "B200": B200, "RTX 4090": RTX_4090, "RTX 5090": RTX_5090}

# every grid of the numbers of tokens at which something changes: tiles of 16, rows of scores, blocks
TOKENS = (1, 15, 16, 17, 63, 64, 65, 112, 113, 128, 129, 192, 196, 197, 208, 209, 240, 255, 256)
GRIDS = [(rows, tokens // rows) for tokens in TOKENS for rows in range(1, tokens + 1) if tokens % rows == 0]
LARGE_GRIDS = [(257, 1), (1, 257), (17, 16), (24, 24), (5, 1000), (128, 128), (1 << 10, 1 << 20)]
BATCH_HEADS = [(1, 1), (1, 9), (7, 9), (128, 9), (1 << 12, 16)]


def empty(batch, heads, head_dim, dtype=torch.float16):
    return torch.empty(batch, heads, 0, head_dim, dtype=dtype)


def is_tiled(launches):
    return launches[0].kernel == b"PositionStatistics"


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_shape_is_refused(device, dropout_p, dtype):
    """Each call asks for what the device has, and for the memory that its kernels use."""
    for grid_size in GRIDS + LARGE_GRIDS:
        for head_dim in range(8, 129, 8):
            contents = set()
            for batch, heads in BATCH_HEADS if grid_size[0] * grid_size[1] < 1 << 30 else BATCH_HEADS[:2]:
                q = empty(batch, heads, head_dim, dtype)
                calls = emulation.launches(q, grid_size, dropout_p, device)
                sizes = emulation.sizes(q, grid_size, dropout_p, device)
                where = (grid_size, head_dim, batch, heads)
                assert all(calls), where
                for launch in (launch for call in calls for launch in call):
                    assert launch.shared_bytes <= device.shared_bytes, where
                    assert 1 <= launch.threads <= 1024, where
                    assert 1 <= launch.grid_x < 1 << 31, where
                    assert 1 <= launch.grid_y < 1 << 16, where
                inference, forward, backward = map(is_tiled, calls)
                assert (sizes.inference_workspace > 0, sizes.forward_workspace > 0) == (inference, forward), where
                assert (sizes.backward_workspace > 0, sizes.content) == (backward, backward), where
                assert backward or sizes.slots == 1, where
                assert forward or not backward, where  # who but tiled kernels writes the content
                contents.add(sizes.content)
            assert len(contents) == 1, "the backend asks for one batch and head"


# (grid_size, head_dim, dropout_p): devices on which whole-image kernels serve it, forward without saving and backward
ALL, LARGE, LARGEST = set(DEVICES), {"A100", "H100", "B200"}, {"H100", "B200"}
SERVED = {
    ((14, 14), 48, 0.0): (ALL, LARGE),  # ConViT
    ((14, 14), 48, 0.1): (ALL, LARGE),
    ((16, 16), 48, 0.0): (ALL, LARGEST),
    ((14, 14), 64, 0.0): (LARGE, LARGEST),
    ((16, 16), 64, 0.0): (LARGE, set()),
    ((8, 32), 48, 0.0): (ALL, set()),
    ((8, 32), 48, 0.1): (ALL, LARGEST),
    ((14, 14), 128, 0.0): (LARGEST, set()),
    ((14, 14), 128, 0.1): (set(), set()),
    ((24, 24), 48, 0.0): (set(), set()),
}


@pytest.mark.parametrize("shape", SERVED, ids=str)
def test_which_family_serves_a_large_batch(shape):
    grid_size, head_dim, dropout_p = shape
    served = set(), set()
    for name, device in DEVICES.items():
        inference, _, backward = emulation.launches(empty(128, 9, head_dim), grid_size, dropout_p, device)
        for names, call in zip(served, (inference, backward), strict=True):
            if not is_tiled(call):
                names.add(name)
    assert served == SERVED[shape]


# what a model of the machine has found fastest, or within 3 % of it
ROW_BLOCKS = {
    (H100, 14, 48): {1: 4, 9: 4, 36: 3, 45: 2, 72: 1, 132: 1, 133: 2, 198: 2, 199: 1, 396: 1, 1152: 1},  # 3 resident
    (H100, 16, 48): {132: 1, 133: 1, 264: 1},  # 2
    (A100, 14, 48): {36: 3, 108: 1, 109: 1},
    (RTX_4090, 14, 48): {42: 2, 128: 1, 129: 1},  # 1, of twice the warps
    (H100, 8, 48): {1: 1},  # as many tiles of rows as a block has warps
}


@pytest.mark.parametrize(("device", "side", "head_dim"), ROW_BLOCKS)
def test_query_rows_are_split_while_multiprocessors_or_places_on_them_are_free(device, side, head_dim):
    expected = ROW_BLOCKS[device, side, head_dim]
    grids = {}
    for images in expected:
        ((launch,), *_) = emulation.launches(empty(images, 1, head_dim), (side, side), 0.0, device)
        grids[images] = launch.grid_x, launch.grid_y
    assert grids == {images: (images, row_blocks) for images, row_blocks in expected.items()}


def forward(shape, **settings):
    """The output, and what was counted."""
    tensors = (t.detach() for t in inputs(*shape, torch.float16))
    call = Call(*tensors, None, *shape[2], 0.1, 0.0)
    with emulation.using(**settings) as counts:
        return cuda.forward(call, False).out, counts()


def test_a_block_alone_on_its_multiprocessor_has_twice_the_warps_and_the_same_result():
    shape, outputs = (1, 2, (9, 13), 48), []
    for device, threads in ((H100, 128), (RTX_4090, 256)):
        ((launch,), *_) = emulation.launches(empty(1, 2, 48), (9, 13), 0.0, device)
        assert launch.threads == threads
        outputs.append(forward(shape, device=device, row_blocks=1, schedule=1)[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("device", "row_blocks"), [(H100, 2), (RTX_4090, 0)], ids=["whole image", "tiled"])
def test_what_is_chosen_runs_in_the_workspace_that_was_asked_for(device, row_blocks):
    shape = (1, 2, (9, 9), 128)
    out, counts = forward(shape, device=device)
    expected, expected_counts = forward(shape, row_blocks=row_blocks)
    assert torch.equal(out, expected)
    assert counts == expected_counts


def test_nothing_is_launched_for_nothing():
    assert emulation.launches(empty(0, 3, 48), (14, 14)) == [[], [], []]
    sizes = [emulation.sizes(empty(batch, 3, 48), (14, 14)) for batch in (0, 1)]
    assert [[getattr(s, name) for name, _ in s._fields_] for s in sizes] == 2 * [[1, 0, 0, 0, False]]
