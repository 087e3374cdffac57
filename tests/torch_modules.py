"""Torch modules: those of torch.nn with parameters that tests/models.py lacks, one line each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.cases import Case, floats, tokens


class Run(nn.Module):
    """A module and how it runs on one tensor."""

    def __init__(self, module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.module, self.run = module, run

    def forward(self, x):
        return self.run(self.module, x)


def case(build: Callable[[], nn.Module], inputs: Callable[[], Tensor], run=None, name: str = "") -> Case:
    """A module that takes one tensor, or is run on one by `run`."""
    run = run or (lambda module, x: module(x))
    return Case(name or type(build()).__name__, lambda: Run(build(), run), inputs)


def twice(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x)


def cell(module: nn.Module, x: Tensor) -> Tensor:
    """Two steps."""
    state = module(x)
    state = module(x, state)
    return torch.cat(state, -1) if isinstance(state, tuple) else state


OFF = {"dropout": 0.0, "batch_first": True}
SHAPES = {"d_model": 8, "nhead": 2, "dim_feedforward": 12}
TORCH_MODULES = [
    case(lambda: nn.Bilinear(4, 4, 3), floats(3, 4), twice),
    case(lambda: nn.PReLU(8), floats(3, 8)),
    case(lambda: nn.RNN(4, 5), floats(3, 2, 4), lambda module, x: module(x)[0]),
    case(lambda: nn.LSTM(4, 5, proj_size=3), floats(3, 2, 4), lambda module, x: module(x)[0], "LSTM_proj_size"),
    case(lambda: nn.RNNCell(4, 5), floats(3, 4), cell),
    case(lambda: nn.LSTMCell(4, 5), floats(3, 4), cell),
    case(lambda: nn.GRUCell(4, 5), floats(3, 4), cell),
    case(
        lambda: nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True, batch_first=True),
        floats(3, 5, 8),
        lambda module, x: module(x, x, x)[0],
        "MultiheadAttention_bias_kv",
    ),
    case(lambda: nn.TransformerDecoderLayer(**SHAPES, **OFF), floats(3, 5, 8), twice),
    case(lambda: nn.Transformer(**SHAPES, **OFF, num_encoder_layers=1, num_decoder_layers=1), floats(3, 5, 8), twice),
    case(lambda: nn.BatchNorm1d(4, momentum=None), floats(9, 4)),
    case(
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4, affine=False)),
        floats(2, 2, 3, 3, 3),
        None,
        "BatchNorm3d",
    ),
    case(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), floats(2, 4, 3, 3)),
    case(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", groups=2), floats(3, 2, 5, 5)),
    case(lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, output_padding=1), floats(3, 4, 3, 3)),
    case(lambda: nn.EmbeddingBag(11, 4, mode="max"), tokens(3, 5), None, "EmbeddingBag_max"),
    case(lambda: nn.EmbeddingBag(11, 4, mode="sum", padding_idx=4), tokens(3, 5), None, "EmbeddingBag_padding"),
    case(lambda: nn.AdaptiveLogSoftmaxWithLoss(32, 11, [3, 7]), floats(3, 32), lambda module, x: module.log_prob(x)),
    case(lambda: parametrizations.weight_norm(nn.Linear(4, 3)), floats(3, 4), None, "weight_norm"),
    case(lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), floats(3, 4), None, "spectral_norm"),
    case(lambda: parametrizations.weight_norm(nn.Conv1d(4, 3, 2)), floats(3, 4, 5), None, "weight_norm_conv"),
    case(lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), floats(3, 4), None, "old_spectral_norm"),
]
