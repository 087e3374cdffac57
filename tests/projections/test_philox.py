import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from subspace_peft.projections.philox import Philox, box_muller, cipher


PHILOX = Philox(0, "layers.0.weight", "test")


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    words = cipher(tuple(torch.tensor([c]) for c in counter), key)
    assert [int(w) for w in words] == list(expected)


def test_words_are_ciphers_of_their_index():
    lanes = cipher(tuple(torch.tensor([c]) for c in (5, 0, 0, 0)), PHILOX.key)
    assert [int(w) for w in PHILOX.bits(20, 24)] == [int(w) for w in lanes]


def test_key_is_fixed():
    assert Philox(7, "layers.0.weight", "signs", 1).key == (KEY := Philox(7, "layers.0.weight", "signs").key)
    others = [
        Philox(8, "layers.0.weight", "signs"),
        Philox(7, "layers.1.weight", "signs"),
        Philox(7, "layers.0.weight", "permutation"),
        Philox(7, "layers.0.weight", "signs", 2),
    ]
    assert KEY not in [other.key for other in others]


DRAWS = {
    "bits": lambda start, stop: PHILOX.bits(start, stop),
    "signs": lambda start, stop: PHILOX.signs(start, stop),
    "uniforms": lambda start, stop: PHILOX.uniforms(start, stop),
    "normals": lambda start, stop: PHILOX.normals(start, stop)[0],
    "streams of normals": lambda start, stop: PHILOX.normals(start, stop, streams=range(3, 6)).T,
    "integers": lambda start, stop: PHILOX.integers(1000, start, stop),
    "permutations": lambda start, stop: PHILOX.permutations(17, start, stop),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@given(start=st.integers(0, 300), length=st.integers(1, 100))
@settings(max_examples=15, deadline=None)
def test_any_slice_can_be_drawn_alone(draw, start, length):
    assert torch.equal(draw(start, start + length), draw(0, 400)[start : start + length])


def test_slices_across_chunks_and_beyond_32_bits(monkeypatch):
    far = 2**34
    expected = PHILOX.normals(far - 50, far + 50)
    monkeypatch.setattr("subspace_peft.projections.philox.COUNTERS_AT_A_TIME", 4)
    assert torch.equal(PHILOX.normals(far - 50, far + 50), expected)
    assert not torch.equal(PHILOX.bits(far, far + 8), PHILOX.bits(0, 8))


def test_streams_differ_and_stand_alone():
    both = PHILOX.normals(0, 50, streams=range(2))
    assert torch.equal(both[1:], PHILOX.normals(0, 50, streams=range(1, 2)))
    assert not torch.equal(both[0], both[1])


def test_normals_are_box_muller():
    v, w = PHILOX.bits(0, 1000), PHILOX.bits(1000, 2000)
    cosine, sine = box_muller(v, w)
    r = torch.sqrt(-2 * torch.log((v.double() + 0.5) / 2**32))
    x = ((w >> 2).double() + 0.5) / 2**30 * torch.pi / 2
    torch.testing.assert_close(cosine.abs(), r * x.cos(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sine.abs(), r * x.sin(), rtol=1e-9, atol=1e-12)


def test_normals_of_extreme_words_are_finite():
    words = torch.tensor([0, 1, 2, 3, 2**32 - 1, 2**32 - 2, 2**31])
    for z in box_muller(words.repeat_interleave(7), words.repeat(7)):
        assert z.isfinite().all()
        assert z.abs().max() < 6.8


def test_distributions():
    n = 200_000
    assert stats.kstest(PHILOX.normals(0, n)[0].double().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(PHILOX.uniforms(0, n).double().numpy(), "uniform").pvalue > 1e-3
    counts = torch.bincount(PHILOX.integers(97, 0, n), minlength=97)
    assert len(counts) == 97
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    signs = PHILOX.signs(0, n)
    assert signs.abs().eq(1).all()
    for lag in (1, 2, 31, 32, 33, 128):  # a sum of products is normal with variance n
        assert abs((signs[lag:] * signs[:-lag]).sum()) < 4 * n**0.5


def test_neighbouring_normals_are_uncorrelated():
    z = PHILOX.normals(0, 200_000)[0].double()
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 / len(z) ** 0.5
        assert abs((z[lag:] ** 2 * z[:-lag] ** 2).mean() - 1) < 12 / len(z) ** 0.5


def test_permutations_are_uniform():
    permutations = PHILOX.permutations(4, 0, 24_000)
    assert torch.equal(permutations.sort(dim=1).values, torch.arange(4).expand(24_000, 4))
    counts = torch.bincount((permutations * torch.tensor([64, 16, 4, 1])).sum(1), minlength=256)
    assert (counts > 0).sum() == 24
    assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-3
    assert torch.equal(PHILOX.permutations(1, 0, 3), torch.zeros(3, 1, dtype=torch.int64))
