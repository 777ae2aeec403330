"""How exact every backend is, beside the formula run by eager PyTorch in the same dtype and under autocast.

All start from the same numbers of that dtype; the truth is the formula in float64 on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import check
from benchmarks.measure import failed, gradients
from benchmarks.peers import Unavailable, inputs, ours
from benchmarks.results import Row
from benchmarks.workloads import Case, Profile
from gpsa_kernels import BACKENDS

DTYPES = ("float32", "float16", "bfloat16")


def cases(device: str, profile: Profile) -> list[Case]:
    """Whole images at every head_dim, a rectangle, and a grid that takes more than one tile."""
    shapes = [(14, 14, 48), (8, 8, 32), (14, 14, 64), (16, 28, 48)] + [(32, 32, 48)] * (device == "cuda")
    if profile != "full":
        shapes = [(14, 14, 48)] if profile == "quick" else [(4, 4, 16)]
    batch, heads = (32, 9) if device == "cuda" else (2, 9) if profile != "dry" else (1, 2)
    return [Case(batch, heads, *shape, dtype) for shape in shapes for dtype in DTYPES]


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Maximum and root mean square of the difference."""
    difference = (got.double() - truth).nan_to_num(nan=check.HOPELESS)
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def autocast(tensors: Sequence[Tensor], grad_out: Tensor, case: Case) -> list[Tensor]:
    """The formula as it runs in a model under autocast: parameters in float32, products in the case's dtype."""
    device, dtype = tensors[0].device.type, getattr(torch, case.dtype)

    def function(*leaves: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return check.literal(*leaves, case.grid_size, case.scale)

    leaves = [t.detach().float().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def case_rows(case: Case, device: str, lost: Mapping[str, str]) -> Iterator[Row]:
    """A row for every backend and tensor; ``lost`` are peers that are left out, and why."""
    tensors = inputs(case, device, 0)
    grad_out = torch.randn_like(tensors[0])
    truth = check.formula(tensors, grad_out, case, torch.float64)
    beside = {
        "eager": check.formula(tensors, grad_out, case, getattr(torch, case.dtype)),
        "autocast": autocast(tensors, grad_out, case),
    }
    for name in BACKENDS:
        header: Row = {"section": "accuracy", "workload": str(case), "peer": f"gpsa_kernels {name}"}
        if header["peer"] in lost:
            yield {**header, "status": "failed", "reason": lost[header["peer"]]}
            continue
        try:
            got = gradients(ours(name).prepare(case, tensors), tensors, grad_out)
        except Unavailable as error:
            yield {**header, "status": "unavailable", "reason": str(error)}
            continue
        except Exception as error:  # a backend's failure, of whatever kind, is a result
            yield failed(header, error)
            continue
        for index, tensor in enumerate(check.NAMES):
            row: Row = {**header, "status": "ok", "tensor": tensor}
            row["max_error"], row["rms_error"] = errors(got[index], truth[index])
            for who, theirs in beside.items():
                row[f"{who}_max_error"], row[f"{who}_rms_error"] = errors(theirs[index], truth[index])
            yield row
