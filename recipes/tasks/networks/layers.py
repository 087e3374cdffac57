"""Layers that torch does not have: untied weights, kernels larger than the image, another memory layout."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class ChannelsLast(nn.Module):
    """x in the memory layout of channels last, which convolutions keep. The values are the same."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape  # not x.to(memory_format=...), which vmap does not know
        return x.movedim(1, -1).flatten().view(n, h, w, c).movedim(-1, 1)


class LocallyConnected2d(nn.Module):
    """A convolution whose weights are untied: every position p of the output has a kernel and biases of its own.

        y[n, o, p] = Σ_i weight[p, o, i] patch_p(x[n])[i] + bias[p, o]

    with i over the c_in k² pixels that p sees. weight: [h w, c_out, c_in k²], bias: [h w, c_out].

    A position is one linear map, so its fan-in is c_in k²: weights are He-normal in that, of variance 2 / (c_in k²),
    biases zero. The published initialisations count more into the fan-in and are too small: Gargiulo 2023 the
    positions and the output channels, by sqrt(c_out h w), 59 and 32 times in the Untied LeNet on MNIST; Li et al. 2018
    (Keras 2.1.5) the positions, by sqrt(h w), 24 and 8 times. The logits at the start then vary over MNIST images with
    a deviation of 3e-5 and 3e-4, in place of 5e-2, and gradients are small. After one epoch with Gargiulo's, SGD of
    lr 0.1 is at an accuracy of 11 %, in place of 92 %; Adam of lr 3e-3 makes up for the scale: 96 %, in place of 98 %.
    """

    def __init__(self, c_in: int, c_out: int, side: int, kernel: int, padding: int = 0):
        super().__init__()
        self.kernel, self.padding, self.side = kernel, padding, side + 2 * padding - kernel + 1
        self.weight = nn.Parameter(torch.empty(self.side**2, c_out, c_in * kernel**2))
        self.bias = nn.Parameter(torch.zeros(self.side**2, c_out))
        nn.init.normal_(self.weight, std=(2 / self.weight.shape[-1]) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        n, k = x.shape[0], self.kernel
        # With the batch in the last place a patch is copied in long runs, which is where the time goes.
        pixels = pad(x, [self.padding] * 4).permute(2, 3, 1, 0).contiguous()  # [H, W, c_in, n]
        patches = pixels.unfold(0, k, 1).unfold(1, k, 1).permute(0, 1, 2, 4, 5, 3).reshape(self.side**2, -1, n)
        y = torch.baddbmm(self.bias[..., None], self.weight, patches)  # [h w, c_out, n]
        return y.permute(2, 0, 1).reshape(n, self.side, self.side, -1).movedim(-1, 1)  # in channels last, to be pooled


class MaximalConv2d(nn.Module):
    """A convolution "same" with the largest kernel that matters: K = 2 side - 1, so every output sees the whole image.

        y[o, p] = Σ_c Σ_q weight[o, c, q - p + side - 1] x[c, q] + bias[o]        p, q: two-dimensional

    weight: [c_out, c_in, K, K], initialised as that of nn.Conv2d. Computed by the Fourier transform over a circle of
    2 side pixels, long enough that nothing wraps onto the outputs: exact, and 9 to 38 times faster on a CPU core than
    nn.Conv2d in batches of 128; a matrix gathered from the kernel was level on MNIST, up to 2.5 times slower on CIFAR.
    """

    def __init__(self, c_in: int, c_out: int, side: int):
        super().__init__()
        self.side = side
        like = nn.Conv2d(c_in, c_out, 2 * side - 1)
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        # The centre of the kernel moves to the origin of the circle: output p then lies at p.
        kernel = pad(self.weight, (0, 1, 0, 1)).roll((1 - self.side, 1 - self.side), (2, 3))
        y = torch.einsum("ncij,ocij->noij", self._transform(x), self._transform(kernel).conj())
        rows = torch.fft.ifft(y, dim=2)[:, :, : self.side]
        return torch.fft.irfft(rows, n=2 * self.side)[..., : self.side] + self.bias[:, None, None]

    def _transform(self, x: Tensor) -> Tensor:
        """x padded with zeros: [..., 2 side, side + 1]."""
        return torch.fft.fft(torch.fft.rfft(x, n=2 * self.side), n=2 * self.side, dim=2)
