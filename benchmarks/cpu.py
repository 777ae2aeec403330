"""GPSA on the CPU against timm's own layer code: one interleaved run, written to benchmarks/results/.

python benchmarks/cpu.py [--rounds N] [--threads N] [--output FILE]
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dispatch
import timm
import torch
import torch.nn.functional as F
from timing import in_own_processes, interleaved, summary
from timm.models.convit import GPSA
from torch import Tensor, nn

import gpsa_kernels
from gpsa_kernels import FusedGPSA, fuse

RESULTS = Path(__file__).parent / "results"
PLAIN, FUSED, DEIT = "plain SDPA, no position", "gpsa_kernels, fused", "DeiT tiny, no position"
Call = Callable[[], Any]


class Given(nn.Module):
    """A projection whose result is known already, so that a layer's own code runs on given q, k and v."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result
        self.weight = result.detach()  # which layers ask for its device and dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.result


def attention_layers(batch: int, heads: int, side: int, head_dim: int) -> tuple[dict[str, Call], list[Tensor]]:
    """timm's GPSA, FusedGPSA on every backend, and plain SDPA without a position, all on the same q, k and v.

    Returns the calls by name and the tensors to differentiate: qk, v, the position weights and the gates.
    """
    dim, tokens = heads * head_dim, side * side
    qk = torch.randn(batch, tokens, 2 * dim, requires_grad=True)
    v = torch.randn(batch, tokens, dim, requires_grad=True)
    x = v.detach()
    reference = GPSA(dim, heads)
    reference.local_init()
    layers: dict[str, nn.Module] = {"timm": reference}
    for backend in ("auto", "eager"):
        layers[f"gpsa_kernels, {backend}"] = layer = FusedGPSA(dim, heads, backend=backend)
        layer.load_state_dict(reference.state_dict())
        layer.pos_proj, layer.gating_param = reference.pos_proj, reference.gating_param
    for layer in layers.values():
        layer.qk, layer.v, layer.proj = Given(qk), Given(v), nn.Identity()

    def plain() -> Tensor:
        q, k = qk.view(batch, tokens, 2, heads, head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v.view(batch, tokens, heads, head_dim).transpose(1, 2))
        return out.transpose(1, 2).reshape(batch, tokens, dim)

    calls: dict[str, Call] = {name: (lambda layer=layer: layer(x)) for name, layer in layers.items()}
    calls[PLAIN] = plain
    return calls, [qk, v, reference.pos_proj.weight, reference.gating_param]


def proved(calls: dict[str, Call], tensors: list[Tensor]) -> dict[str, float]:
    """The largest deviation of every call's result and gradients from the first one's, relative to its largest."""
    deviations: dict[str, float] = {}
    expected: list[Tensor] = []
    for name, call in calls.items():
        if name == PLAIN:
            continue
        out = call()
        got = [out, *torch.autograd.grad(out.square().sum(), tensors)]
        expected = expected or got
        deviation = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True))
        assert deviation < 1e-3, f"{name} computes something else: {deviation}"
        deviations[name] = deviation
    return deviations


def saved_bytes(call: Call, tensors: list[Tensor]) -> int:
    """Bytes that the graph of ``call`` keeps for its backward pass, the tensors of the caller included."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()  # alive until the counting is over, or an address could be used twice
    assert out.requires_grad
    return sum(storages.values())


def operator_rows(rounds: int) -> list[dict[str, Any]]:
    calls, tensors = attention_layers(8, 9, 14, 48)
    deviations = proved(calls, tensors)
    grad_out = torch.randn(8, 196, 432)

    def both(call: Call) -> Call:
        return lambda: torch.autograd.grad(call(), tensors, grad_out, allow_unused=True)

    rows = []
    for workload, kind in (("operator forward", torch.no_grad()), ("operator forward and backward", both)):
        for peer, seconds in interleaved({peer: kind(call) for peer, call in calls.items()}, rounds).items():
            rows.append({"workload": workload, "peer": peer, "deviation": deviations.get(peer), **summary(seconds)})
    return rows


def model(peer: str) -> nn.Module:
    """timm's convit_tiny, the same fused, or the DeiT of its size, with random weights."""
    made = timm.create_model("deit_tiny_patch16_224" if peer == DEIT else "convit_tiny")
    return fuse(made) if peer == FUSED else made


def model_call(peer: str, training: bool) -> Call:
    network = model(peer).train(training)
    images, labels = torch.randn(4, 3, 224, 224), torch.randint(1000, (4,))

    @torch.inference_mode()
    def inference() -> Tensor:
        return network(images)

    def training_step() -> None:
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()

    return training_step if training else inference


def model_deviation() -> float:
    """How far the fused model's result is from timm's, relative to its largest."""
    network = model("timm").eval()
    images = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        expected = network(images)
        got = fuse(copy.deepcopy(network))(images)
    deviation = ((got - expected).abs().max() / expected.abs().max()).item()
    assert deviation < 1e-3, f"the fused model computes something else: {deviation}"
    return deviation


def model_rows(rounds: int, threads: int) -> list[dict[str, Any]]:
    deviation = model_deviation()
    rows = []
    for workload, training in (("convit_tiny inference", False), ("convit_tiny training step", True)):
        peers = {peer: (peer, training) for peer in ("timm", FUSED, DEIT)}
        for peer, seconds in in_own_processes(peers, model_call, rounds, threads).items():
            own = deviation if peer == FUSED else None
            rows.append({"workload": workload, "peer": peer, "deviation": own, **summary(seconds)})
    return rows


def memory_rows() -> list[dict[str, Any]]:
    calls, tensors = attention_layers(1, 9, 24, 48)
    return [
        {"workload": "saved for backward, 24x24", "peer": peer, "bytes": saved_bytes(call, tensors)}
        for peer, call in calls.items()
    ]


def dispatch_rows(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, calls in zip(("dispatch forward", "dispatch forward and backward"), dispatch.peers(), strict=True):
        seconds = interleaved(calls, rounds, inner=200)
        rows += [{"workload": name, "peer": peer, **summary(s)} for peer, s in seconds.items()]
    return rows


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="numbers to take of every operator; half of models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / f"cpu-{today}.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    rows = operator_rows(arguments.rounds)
    rows += model_rows(max(3, arguments.rounds // 2), arguments.threads)
    rows += memory_rows()
    torch.set_num_threads(1)
    rows += dispatch_rows(max(3, arguments.rounds // 4))
    report = {
        "date": today,
        "cpu": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": arguments.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "gpsa_kernels": gpsa_kernels.__version__,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists: results are not overwritten, name another file with --output")
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.output}; python benchmarks/report.py shows it")


if __name__ == "__main__":
    main()
