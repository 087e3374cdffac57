"""The exact P of every random projection, for good: a file written today must load in ten years.

`golden/projections.safetensors` holds some rows of P for each case, and some numbers of the generator. It is never
rewritten. If P must change, its class gets the next projection version and can still draw the old one; then
`python -m tests.projections.test_golden` adds the cases that are not in the file.
"""

from math import prod
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
MATRICES = [((256, 256), 170), ((307, 512), 37), ((2048, 1024), 1000)]  # (shape, d), mixed by `kronecker`
CASES += [("kronecker", shape, d, None) for shape, d in MATRICES]
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


def rows(name, size, d, nnz, version):
    """The first and the last rows of P, float32 [4 or fewer, d]; the size is n or the shape of a matrix."""
    n, shape = (prod(size), size) if isinstance(size, tuple) else (size, None)
    tensor_rows = TensorRows(
        "encoder.layers.0.weight", n, d, seed=2**40, nnz_per_row=nnz, version=version, shape=shape
    )
    positions = sorted({*range(n)[: ROWS // 2], *range(n)[-ROWS // 2 :]})
    unit = torch.zeros(len(positions), n, dtype=torch.float64)
    unit[range(len(positions)), positions] = 1
    return PROJECTIONS[name](tensor_rows).transpose(unit).float()


def key(name, size, d, nnz, version):
    n = "x".join(map(str, size)) if isinstance(size, tuple) else size
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


def add() -> None:
    """Add the cases that are not in the file yet; those that are never change."""
    tensors = stored() if FILE.exists() else {f"philox/{name}": draw() for name, draw in DRAWS.items()}
    for case in CASES:
        for version in range(1, PROJECTIONS[case[0]].VERSION + 1):
            if key(*case, version) not in tensors:
                tensors[key(*case, version)] = rows(*case, version).contiguous()
    save_file(tensors, FILE)


if __name__ == "__main__":
    add()
