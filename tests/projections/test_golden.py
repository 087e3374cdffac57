"""The exact P of every random projection, for good: a file written today must load in ten years.

`golden/projections.safetensors` holds some rows of P for each case, and some numbers of the generator. It is never
rewritten. If P must change, its class gets the next projection version and can still draw the old one; then
`python tests/projections/test_golden.py 2` adds the cases of version 2 to the file.
"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from subspace_peft.projections import PROJECTIONS, TensorRows
from subspace_peft.projections.philox import Philox


FILE = Path(__file__).parents[1] / "golden" / "projections.safetensors"
SIZES = [(6, 3), (40, 170), (2400, 50), (700, 170), (300, 600)]  # (n, d)
CASES = [(name, n, d, None) for name in ("dense", "sparse", "fastfood", "fastjl") for n, d in SIZES]
CASES += [("kronecker", n, d, None) for n, d in ((6, 3), (1024, 170), (48 * 64, 37), (96 * 256, 300))]
CASES += [(name, 120, 5000, None) for name in ("fastfood", "fastjl")]
CASES += [(name, n, d, 4) for name in ("sparse", "fastjl") for n, d in ((40, 170), (300, 600))]
ROWS = 4  # of each P that the file holds: the first two and the last two
PHILOX = Philox(2**40, "encoder.layers.0.weight", "golden")
DRAWS = {
    "bits": lambda: PHILOX.bits(0, 64),
    "signs": lambda: PHILOX.signs(0, 64),
    "uniforms": lambda: PHILOX.uniforms(0, 64),
    "normals": lambda: PHILOX.normals(0, 64),
    "integers": lambda: PHILOX.integers(1000, 0, 64),
    "permutations": lambda: PHILOX.permutations(20, 0, 3),
}


def rows(name, n, d, nnz, version):
    """The first and the last rows of P, float32 [4 or fewer, d]."""
    tensor_rows = TensorRows("encoder.layers.0.weight", n, d, seed=2**40, nnz_per_row=nnz, version=version)
    positions = sorted({*range(n)[: ROWS // 2], *range(n)[-ROWS // 2 :]})
    unit = torch.zeros(len(positions), n, dtype=torch.float64)
    unit[range(len(positions)), positions] = 1
    return PROJECTIONS[name](tensor_rows).transpose(unit).float()


def key(name, n, d, nnz, version):
    return f"v{version}/{name}/n={n}/d={d}/nnz={nnz}"


def stored():
    with safe_open(FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def golden():
    return stored()


@pytest.mark.parametrize("draw", DRAWS)
def test_generator(golden, draw):
    assert torch.equal(DRAWS[draw](), golden[f"philox/{draw}"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_projection(golden, case):
    for version in range(1, PROJECTIONS[case[0]].VERSION + 1):
        expected = golden[key(*case, version)]
        if case[0] in ("fastfood", "kronecker"):  # their sums depend on the order of addition
            torch.testing.assert_close(rows(*case, version), expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(rows(*case, version), expected)


def test_golden_file_is_complete(golden):
    versions = [key(*case, v) for case in CASES for v in range(1, PROJECTIONS[case[0]].VERSION + 1)]
    assert set(golden) == {f"philox/{draw}" for draw in DRAWS} | set(versions)


def add(version: int) -> None:
    """Add the cases of a version that is not in the file yet."""
    tensors = stored() if FILE.exists() else {f"philox/{name}": draw() for name, draw in DRAWS.items()}
    new = {key(*case, version): rows(*case, version) for case in CASES if version <= PROJECTIONS[case[0]].VERSION}
    if tensors.keys() & new.keys():
        raise SystemExit(
            f"version {version} is already in {FILE.name} and never changes; a change of P needs the next version."
        )
    save_file(tensors | {name: tensor.contiguous() for name, tensor in new.items()}, FILE)


if __name__ == "__main__":
    add(int(sys.argv[1]))
