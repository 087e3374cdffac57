"""Models that read parameters of their children, call their methods or use their properties."""

import copy

import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from tests.cases import dense_P, move, settings, theta_d


class Fused(nn.Module):
    """Reads parameters of its child and never calls it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class Looped(nn.Module):
    """Reads the same parameter at each step of a loop, as a recurrent cell does."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(4):
            x = torch.tanh(x @ self.cell.weight.T) + self.cell.bias
        return x


class Scorer(nn.Module):
    """Has methods and a property beside forward."""

    def __init__(self):
        super().__init__()
        self.transitions = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.transitions

    def decode(self, x, scale=1.0):
        return scale * self(x) + self.row

    @property
    def row(self):
        return self.transitions[0]


class Decoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.crf = Scorer()

    def forward(self, x):
        return self.crf.decode(x, scale=2.0) + self.crf.row.sum()


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.mix(self.embed(x.argmax(-1).clamp(max=8)))
        return h @ self.embed.weight.T


class Autograd(torch.autograd.Function):
    """A function of another library: torch hands it its tensors as they are."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


class Custom(Fused):
    def forward(self, x):
        return Autograd.apply(x, self.qkv.weight) + self.qkv.bias


class Cell(nn.Module):
    """Keeps a state that only its forward makes, and its parent takes away."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        before = getattr(self, "state", None)
        self.state = x @ self.weight + (0 if before is None else before)
        return self.state


class Sequence(nn.Module):
    def __init__(self, is_first: bool):
        super().__init__()
        self.cell, self.is_first = Cell(), is_first

    def forward(self, x):
        if self.is_first:
            self.cell.state = None
        self.cell(x)
        y = self.cell(x)
        if not self.is_first:
            self.cell.state = None
        return y


class Doubled(nn.Linear):
    """Reads a switch of its class in a property, and counts in an attribute that only its code names."""

    is_doubled = False

    @property
    def factor(self):
        return sum(2 if self.is_doubled else 1 for _ in range(1))

    def forward(self, x):
        setattr(self, "steps", getattr(self, "steps", 0) + 1)  # noqa: B010
        return super().forward(x) * self.factor + self.steps


MODELS = [Fused, Looped, Decoded, TiedHead, Custom]


def moved_pair(kind, **changes):
    torch.manual_seed(0)
    plain = kind().double()
    model = get_peft_model(copy.deepcopy(plain), settings(**changes)).double()
    move(model, size=0.3)
    with torch.no_grad():
        for name, P in dense_P(model).items():
            parameter = plain.get_parameter(name)
            parameter.add_((P.double() @ theta_d(model)).view(parameter.shape))
    return model, plain


def x():
    return torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
