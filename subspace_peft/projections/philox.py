"""Random numbers that are a pure function of (key, index): Philox4x32-10.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Word 4 i + l of a stream is
lane l of the cipher of the counter (i mod 2^32, i div 2^32, stream, 0), so any slice of any stream can be drawn alone.

`torch.Generator` cannot replace it: its numbers differ between CPU and CUDA and between GPU models, and those of
`randn` between CPU kernels. Everything here is integer arithmetic, or float64 arithmetic in single operations whose
rounding IEEE 754 prescribes (+, -, *, /, sqrt), so every number is the same on every device and under every torch
version.
"""

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor


MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 2**32 - 1
COUNTERS_AT_A_TIME = 2**15  # the words and their scratch memory then stay in a core's cache

# log((1 + s) / (1 - s)) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...), cut where |s| <= (sqrt 2 - 1)^2 leaves 1e-13
ATANH = [2 / (2 * k + 1) for k in range(8)]
# 1 - cos x = x^2 / 2! - x^4 / 4! + ..., cut where |x| <= pi / 2 leaves 1e-14
VERSINE = [(-1) ** k / math.factorial(2 * k + 2) for k in range(9)]


def cipher(counter: tuple[Tensor, ...], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 of four int64 tensors that hold 32-bit words: four such tensors."""
    shape = torch.broadcast_shapes(*(word.shape for word in counter))
    x0, x1, x2, x3 = (word.expand(shape).clone(memory_format=torch.contiguous_format) for word in counter)
    p0, p1, high = torch.empty_like(x0), torch.empty_like(x0), torch.empty_like(x0)
    k0, k1 = key
    for _ in range(10):
        # A product beyond 2^63 wraps, which leaves its bits right, and the shift copies its sign above the high word.
        # When p0 and p1 become words, only their low half is valid. Bits above are masked where they would matter.
        torch.mul(x0, MULTIPLIERS[0], out=p0)
        torch.mul(x2, MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=high)
        x1.bitwise_xor_(high).bitwise_xor_(k0).bitwise_and_(MASK)
        torch.bitwise_right_shift(p0, 32, out=high)
        x3.bitwise_xor_(high).bitwise_xor_(k1).bitwise_and_(MASK)
        x0, x1, x2, x3, p0, p1 = x1, p1, x3, p0, x0, x2
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [x0, x1.bitwise_and_(MASK), x2, x3.bitwise_and_(MASK)]


def polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """Horner's rule, rounded after each operation: not every device has a fused multiply-add."""
    y = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y.mul_(x).add_(c)
    return y


def box_muller(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 normals from two words: sqrt(-2 log u) times ±cos x and ±sin x.

    u = (v + 1/2) / 2^32; x in (0, pi/2) from the upper 30 bits of w, the signs from the lower two. The logarithm and
    the cosine are computed as polynomials because those of libraries differ in the last bit.
    """
    u = v.to(torch.float64).add_(0.5)
    bits = u.view(torch.int64)
    exponent = (bits >> 52).to(torch.float64)
    m = bits.bitwise_and_(2**52 - 1).bitwise_or_(1023 << 52).view(torch.float64)  # mantissa, [1, 2)
    s = (m - math.sqrt(2)).div_(m.add_(math.sqrt(2)))
    log = polynomial(s * s, ATANH).mul_(s).add_(exponent.mul_(math.log(2)))
    r = log.sub_((1023 + 32 - 0.5) * math.log(2)).mul_(-2).clamp_(min=0).sqrt_()
    x = (w >> 2).to(torch.float64).add_(0.5).mul_(math.pi / 2**31)
    x.mul_(x)
    h = polynomial(x, VERSINE).mul_(x)  # 1 - cos
    sine = (2 - h).mul_(h).sqrt_().mul_(r).mul_((w & 2).neg_().add_(1))
    return h.neg_().add_(1).mul_(r).mul_((w & 1).mul_(-2).add_(1)), sine


def as_signs(octets: Tensor) -> Tensor:
    """The float32 ±1 of bytes of signs: [...] -> [... * 8]."""
    # torch.compile ignores a cache, and warns about it
    table = (_signs_of_bytes.__wrapped__ if torch.compiler.is_compiling() else _signs_of_bytes)(octets.device)
    return table.index_select(0, octets.reshape(-1).int()).view(*octets.shape[:-1], -1)


@lru_cache
def _signs_of_bytes(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return 1.0 - 2.0 * (torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1)


class Philox:
    """The random numbers of one purpose for one tensor: `Philox(seed, "layers.0.weight", "signs")`.

    The key is the first 8 bytes, little-endian, of BLAKE2b over "subspace_peft\\0version\\0seed\\0name\\0purpose".
    """

    def __init__(self, seed: int, name: str, purpose: str, version: int = 1):
        text = "\0".join(("subspace_peft", str(version), str(seed), name, purpose))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        self.key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))

    def _lanes(self, first: int, last: int, streams: range, device) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields the first counter of each chunk, and its four lanes: int64 [streams, counters] each."""
        stream = torch.arange(streams.start, streams.stop, device=device).unsqueeze(1)
        zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
        step = max(1, COUNTERS_AT_A_TIME // max(1, len(streams)))
        for start in range(first, last, step):
            index = torch.arange(start, min(start + step, last), device=device).unsqueeze(0)
            yield start, cipher((index & MASK, index >> 32, stream, zero), self.key)

    def _fill(self, start: int, stop: int, streams: range, dtype: torch.dtype, device, make) -> Tensor:
        """Numbers start to stop of each stream, which `make` computes from four lanes: [streams, stop - start]."""
        first, last = start // 4, -(-stop // 4)
        out = torch.empty(len(streams), 4 * (last - first), dtype=dtype, device=device)
        for counter, lanes in self._lanes(first, last, streams, device):
            at = 4 * (counter - first)
            part = out[:, at : at + 4 * lanes[0].shape[1]].unflatten(1, (-1, 4))
            for lane, words in enumerate(make(lanes)):
                part[..., lane] = words
        return out[:, start - 4 * first : stop - 4 * first]

    def bits(self, start: int, stop: int, device="cpu") -> Tensor:
        """Words start to stop of stream 0: int64 in [0, 2^32)."""
        return self._fill(start, stop, range(1), torch.int64, device, lambda lanes: lanes)[0]

    def signs(self, start: int, stop: int, device="cpu") -> Tensor:
        """float32 ±1; sign i is bit i mod 32 of word i div 32."""
        first = start // 8
        return as_signs(self.sign_bytes(first, -(-stop // 8), device))[start - 8 * first : stop - 8 * first]

    def sign_bytes(self, start: int, stop: int, device="cpu") -> Tensor:
        """Bytes start to stop of the signs: uint8; sign i is bit i mod 8 of byte i div 8, 1 for -1."""
        first, last = start // 4, -(-stop // 4)
        words = self.bits(first, last, device)
        octets = torch.stack([words >> shift & 255 for shift in (0, 8, 16, 24)], 1).to(torch.uint8)
        return octets.view(-1)[start - 4 * first : stop - 4 * first]

    def uniforms(self, start: int, stop: int, device="cpu") -> Tensor:
        """float32 multiples of 2^-24 in [0, 1)."""
        make = lambda lanes: [(lane >> 8).to(torch.float32).mul_(2.0**-24) for lane in lanes]  # noqa: E731
        return self._fill(start, stop, range(1), torch.float32, device, make)[0]

    def normals(self, start: int, stop: int, device="cpu", streams: range = range(1)) -> Tensor:
        """float32 standard normals [streams, stop - start], by Box-Muller from lanes (0, 1) and (2, 3)."""
        make = lambda lanes: (*box_muller(*lanes[:2]), *box_muller(*lanes[2:]))  # noqa: E731
        return self._fill(start, stop, streams, torch.float32, device, make)

    def integers(self, high: int, start: int, stop: int, device="cpu") -> Tensor:
        """int64 in [0, high), high < 2^31: (word * high) div 2^32."""
        return self.bits(start, stop, device).mul_(high) >> 32

    def permutations(self, size: int, start: int, stop: int, device="cpu") -> Tensor:
        """int64 [stop - start, size]: rows start to stop of a stack of independent, uniform permutations.

        Entry i is sorted by 63 bits, the upper ones random, the lower ones i itself: no two keys are equal, so every
        sorting algorithm gives the same order.
        """
        low = 2 ** max(1, (size - 1).bit_length()) - 1
        words = self.bits(2 * size * start, 2 * size * stop, device).view(-1, size, 2)
        keys = (words[..., 0] >> 1).bitwise_left_shift_(32).bitwise_or_(words[..., 1]).bitwise_and_(~low)
        keys.bitwise_or_(torch.arange(size, device=device))
        if type(keys) is Tensor and keys.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
            keys.numpy().sort(axis=-1)  # ten times as fast
            return keys.bitwise_and_(low)
        return keys.sort(dim=-1).values.bitwise_and_(low)
