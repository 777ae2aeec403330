"""Fused layers are leaves of the graphs that torch.fx traces, and timm's feature extraction works on fused models."""

from __future__ import annotations

import pytest
import timm
import torch
from models import gradients, timm_convit
from test_convert import DyTox, tokens
from timm.models import create_feature_extractor
from torch import fx, nn

from gpsa_kernels import FusedGPSA, SelfAttention, fuse

SMALL = {"image_size": 32, "depth": 3, "local_up_to_layer": 2}


def called(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, grid_size):
        return x + self.layers[1](self.layers[0](x, grid_size))


def test_symbolic_trace():
    model = Residual(FusedGPSA(24, 3), SelfAttention(24, 3)).double()
    traced = fx.symbolic_trace(model)
    assert called(traced.graph) == ["layers.0", "layers.1"]
    assert torch.equal(traced(tokens(), (1, 9)), model(tokens(), (1, 9)))
    assert not torch.equal(traced(tokens(), (1, 9)), traced(tokens(), (3, 3)))


def test_symbolic_trace_of_layers_that_return_more_than_one_value():
    model = fuse(DyTox().double().eval(), outputs=3)
    traced = fx.symbolic_trace(model)
    assert called(traced.graph) == ["sabs.0", "sabs.1"]
    assert torch.equal(traced(tokens()), model(tokens()))


@pytest.mark.parametrize("train", [False, True])
def test_the_whole_of_a_fused_model_is_traced_and_differentiated(train):
    model, x = fuse(timm_convit(**SMALL)).train(train), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    node = timm.models.get_graph_node_names(model)[not train][-1]
    extractor = create_feature_extractor(model, [node]).train(train)
    results = [(f(x), gradients(model, x, f)) for f in (model, lambda x: extractor(x)[node])]
    torch.testing.assert_close(*results, rtol=0, atol=0)
