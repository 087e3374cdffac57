"""A given basis or mask: every form that it can have, one in a file that adapters share, and all that can be wrong."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import SubspaceConfig, Trajectory
from subspace_peft.adapter.walk import unique_coordinates
from subspace_peft.projections import PROJECTIONS, TensorRows
from tests.adapter.bases import CASE, cut, orthonormal, random_mask, refuse, stacked_P, walk
from tests.cases import move, outputs, refused, settings, train, wrap
from tests.trajectory.walks import SHAPES, Allocations, D


@pytest.mark.parametrize("form", ["tensor", "dictionary", "shaped", "file", "folder", "fewer"])
def test_every_form_of_a_basis(form, tmp_path):
    Q = orthonormal()
    given, d = Q, None
    if form == "dictionary":
        given = cut(Q)
    elif form == "shaped":
        given = {name: rows.reshape(*SHAPES[name], 5) for name, rows in cut(Q).items()}
    elif form in ("file", "folder"):
        save_file({"basis": Q}, tmp_path / "basis.safetensors")
        given = str(tmp_path / "basis.safetensors") if form == "file" else tmp_path
    elif form == "fewer":
        d = 3
    model = wrap(CASE, projection="basis", basis=given, d=d, normalization="columns")
    assert model.peft_config["default"].d == (d or 5)
    torch.testing.assert_close(stacked_P(model), Q[:, :d], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["tensor", "dictionary"])
def test_every_form_of_a_mask(form):
    mask = random_mask()
    given = mask
    if form == "dictionary":
        given = {name: rows.reshape(SHAPES[name]) for name, rows in cut(mask).items()}
    model = wrap(CASE, projection="coordinate", mask=given, d=None)
    assert model.peft_config["default"].d == mask.sum()
    assert torch.equal(stacked_P(model), torch.eye(D)[:, mask])
    assert model.base_model.moved_share() == pytest.approx(mask.sum().item() / D)


@pytest.mark.parametrize("projection", ["basis", "coordinate"])
def test_a_given_projection_is_saved_with_the_adapter(projection, tmp_path):
    given = {"basis": orthonormal()} if projection == "basis" else {"mask": random_mask()}
    model = wrap(CASE, projection=projection, d=None, **given)
    train(model, CASE)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(CASE.model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(outputs(loaded, CASE), outputs(model, CASE))


def test_the_users_tensor_may_change_afterwards():
    Q = orthonormal()
    model = wrap(CASE, projection="basis", basis=Q, d=None)
    move(model)
    before = outputs(model, CASE)
    Q.zero_()
    assert torch.equal(outputs(model, CASE), before)


def test_norms_take_no_copy_of_the_basis():
    rows = torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0))
    projection = PROJECTIONS["basis"](TensorRows(name="w", n=200_000, d=8, given=rows))
    with Allocations() as allocations:
        squares = projection.column_square_norms()
    assert rows.nbytes <= allocations.peak < 2 * rows.nbytes  # the peak holds the columns themselves once
    torch.testing.assert_close(squares, rows.double().square().sum(0))


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (orthonormal(rows=D - 1), "one row for each of the D = 114 adapted entries, got shape \\[113, 5\\]"),
        (torch.ones(D), "`basis` must be a matrix \\[D, k\\] with one k for all tensors, got k = \\[0\\]"),
        (2 * orthonormal(), "orthonormal columns, its Gram matrix differs from the identity by 3"),
        (
            orthonormal().index_fill(0, torch.tensor([3]), float("nan")),
            "`basis` must be finite.*`fc1.weight` has others",
        ),
        (
            orthonormal().index_fill(0, torch.tensor([113]), float("inf")),
            "`basis` must be finite.*`fc2.bias` has others",
        ),
        (torch.eye(D)[:, :5].long(), "`basis` must be finite floating numbers, that of `fc1.weight` is torch.int64"),
        (
            {"fc1.weight": torch.ones(60, 2)},
            "one entry for each target tensor and no other, but lacks one for `fc1.bias`",
        ),
        (
            {**cut(orthonormal()), "fc1.bias": torch.ones(11, 5)},
            "`basis` of `fc1.bias` must be of shape \\[10, 'k'\\]",
        ),
        ({**cut(orthonormal()), "fc1.bias": torch.ones(10, 4)}, "with one k for all tensors, got k = \\[4, 5\\]"),
        ("no/such/file", "a safetensors file that exists, got 'no/such/file'"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_bad_basis(basis, message):
    refuse(message, projection="basis", basis=basis, d=None)


def test_a_basis_with_fewer_columns_than_d():
    refuse("`basis` must hold at least d = 7 columns, got 5; lower `d`", projection="basis", basis=orthonormal(), d=7)


@pytest.mark.parametrize(
    ("mask", "d", "message"),
    [
        (torch.ones(D - 1) > 0, None, "one row for each of the D = 114 adapted entries, got shape \\[113\\]"),
        (torch.ones(D), None, "`mask` must be boolean, that of `fc1.weight` is torch.float32"),
        (torch.zeros(D) > 0, None, "`mask` must select at least one entry, got none"),
        (random_mask(), 1, "`d` must equal the [0-9]+ entries that `mask` selects, got 1; leave `d` out"),
    ],
    ids=["shape", "dtype", "empty", "d"],
)
def test_a_bad_mask(mask, d, message):
    refuse(message, projection="coordinate", mask=mask, d=d)


def test_nothing_is_unpickled(tmp_path):
    torch.save({"basis": orthonormal()}, tmp_path / "basis.safetensors")
    with pytest.raises(Exception, match="(?i)header|safetensors"):
        get_peft_model(CASE.model(), settings(projection="basis", d=None, basis=tmp_path / "basis.safetensors"))


@pytest.mark.parametrize("save_projection", [None, True, False])
def test_a_basis_given_as_a_tensor_is_saved_with_the_adapter(save_projection, tmp_path):
    """Older files say False, which was the default of `save_projection`."""
    model = wrap(CASE, projection="basis", d=None, basis=orthonormal(), save_projection=save_projection)
    train(model, CASE)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["save_projection"] is save_projection
    loaded = PeftModel.from_pretrained(CASE.model(), tmp_path).eval()
    assert torch.equal(outputs(loaded, CASE), outputs(model, CASE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_of_a_basis_is_kept(dtype, tmp_path):
    walk(tmp_path / "samples").save_basis(tmp_path / "basis.safetensors", 3, dtype=dtype)
    model = wrap(CASE, projection="basis", basis=tmp_path, d=3)
    train(model, CASE)
    model.save_pretrained(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for key, tensor in state.items() if "subspace_peft_P." in key} == {dtype}
    loaded = PeftModel.from_pretrained(CASE.model(), tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded, CASE), outputs(model, CASE))


# ---------------------------------------------------------------------------------- the folder of a trajectory


@pytest.mark.parametrize("targets", ["all", ["fc2"]], ids=str)
def test_a_trajectory_gives_the_components_of_the_targets(targets, tmp_path):
    trajectory = walk(tmp_path / "samples")
    model = wrap(
        CASE, projection="basis", basis=tmp_path / "samples", d=4, target_modules=targets, normalization="columns"
    )
    names = list(unique_coordinates(model, "default"))
    expected = trajectory.basis(4, names=names)
    torch.testing.assert_close(stacked_P(model), torch.cat([expected[name].reshape(-1, 4) for name in names]))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "samples")
    loaded = PeftModel.from_pretrained(CASE.model(), tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded, CASE), outputs(model, CASE))


def test_a_bad_trajectory(tmp_path):
    walk(tmp_path)
    basis = {"projection": "basis", "basis": str(tmp_path)}
    refuse("`d` is needed for the trajectory in .*: set it to 1 or more", **basis, d=None)
    refuse("`d` must be at most 5, the dimensions that the 6 samples", **basis, d=6)
    refuse("`save_projection=False` needs a basis in a file.*save_basis", **basis, d=2, save_projection=False)
    refuse("a safetensors file that exists", projection="coordinate", mask=tmp_path, d=None)
    refuse("`fc1.weight.B` must be in the samples", **basis, d=2, coordinates="low_rank", rank=2)
    other = CASE.model()
    other.fc2 = nn.Linear(10, 5)
    with pytest.raises(
        ValueError, match=r"`fc2.weight` must have the shape that the trajectory .*\[4, 10\], got \[5, 10\]"
    ):
        get_peft_model(other, settings(**basis, d=2))
    other.fc2 = CASE.model().fc2
    other.fc3 = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="`fc3.weight` must be in the samples .* holds 4 other tensors"):
        get_peft_model(other, settings(**basis, d=2))


@pytest.fixture
def shared(tmp_path):
    """An adapter that leaves its columns in a file, of more columns than it uses."""
    walk(tmp_path / "samples").save_basis(tmp_path / "shared.safetensors", 5)
    config = {"projection": "basis", "basis": tmp_path / "shared.safetensors", "d": 3, "save_projection": False}
    model = wrap(CASE, **config)
    train(model, CASE)
    model.save_pretrained(tmp_path / "adapter")
    return model


def test_a_shared_basis_is_stored_once(shared, tmp_path):
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == 3 + 8  # theta_d and the mark
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["basis"] == str(tmp_path / "shared.safetensors")
    assert len(config["basis_digest"]) == 32
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            CASE.model(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(outputs(loaded, CASE), outputs(shared, CASE))
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(CASE.model(), tmp_path / "again").eval()
    assert torch.equal(outputs(again, CASE), outputs(shared, CASE))
    assert len(load_file(tmp_path / "again" / "adapter_model.safetensors")) == 2


def test_a_shared_basis_that_has_moved(shared, tmp_path):
    (tmp_path / "shared.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(ValueError, match="shared.safetensors'.* If the file has moved: config = SubspaceConfig.from_"):
        PeftModel.from_pretrained(CASE.model(), tmp_path / "adapter")
    config = SubspaceConfig.from_pretrained(tmp_path / "adapter")
    config.basis = str(tmp_path / "moved.safetensors")
    loaded = PeftModel.from_pretrained(CASE.model(), tmp_path / "adapter", config=config).eval()
    assert torch.equal(outputs(loaded, CASE), outputs(shared, CASE))


def test_a_shared_basis_that_has_changed(shared, tmp_path):
    Trajectory(tmp_path / "samples", increments=True).save_basis(tmp_path / "shared.safetensors", 4)
    base = CASE.model()
    with refused(base, "the one that the adapter was trained in: the first 3 columns of .*shared.safe"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
