"""Folding: the same outputs from one direction and its length, and what cannot be folded."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from subspace_peft import SubspaceConfig, fold
from subspace_peft.projections import PROJECTIONS
from tests.cases import BY_NAME, CASES, dense_P, move, outputs, settings, theta_d, train, wrap


MLP = BY_NAME["mlp"]
D = 114  # entries of MLP
GIVEN = {
    "basis": {"basis": torch.linalg.qr(torch.randn(D, 5, generator=torch.Generator().manual_seed(0)))[0], "d": None},
    "coordinate": {"mask": torch.arange(D) % 3 == 0, "d": None},
    "identity": {"d": None},
}


def assert_folded(model, case, before):
    after = outputs(model, case)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert theta_d(model).shape == (1,)
    assert model.peft_config["default"].d == 1
    assert model.peft_config["default"].projection == "basis"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_stay(case, tmp_path):
    """For every kind of module, batch norms included, and after the folded adapter is saved and loaded."""
    model = wrap(case)
    train(model, case)
    base = outputs(wrap(case), case)
    before = outputs(model, case)
    assert not torch.allclose(before, base, atol=1e-4)
    fold(model)
    assert_folded(model, case, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.model(), tmp_path).eval()
    assert torch.equal(outputs(loaded, case), outputs(model, case))


@pytest.mark.parametrize("normalization", ["rows", "columns"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_projection(projection, normalization):
    model = wrap(MLP, projection=projection, normalization=normalization, **GIVEN.get(projection, {}))
    move(model)
    before = outputs(model, MLP)
    P = torch.cat(list(dense_P(model).values()))
    increment = (P @ theta_d(model)).detach()
    fold(model)
    assert_folded(model, MLP, before)
    column = torch.cat(list(dense_P(model).values()))
    torch.testing.assert_close(theta_d(model).detach(), increment.norm().view(1))
    torch.testing.assert_close(column, increment.view(-1, 1) / increment.norm())


def test_the_file_holds_D_numbers(tmp_path):
    model = wrap(MLP, projection="basis", **GIVEN["basis"])
    move(model)
    model.save_pretrained(tmp_path / "five")
    fold(model)
    model.save_pretrained(tmp_path / "one")
    numbers = {
        folder: sum(tensor.numel() for tensor in load_file(tmp_path / folder / "adapter_model.safetensors").values())
        for folder in ("five", "one")
    }
    assert numbers == {"five": 5 * D + 5 + 8, "one": D + 1 + 8}  # theta_d and the mark too


def test_the_length_can_be_trained_and_merged():
    model = wrap(MLP)
    move(model)
    fold(model)
    length = theta_d(model).item()
    train(model, MLP)
    assert theta_d(model).requires_grad
    assert theta_d(model).item() != length
    before = outputs(model, MLP)
    torch.testing.assert_close(outputs(model.merge_and_unload(), MLP), before)


def test_another_adapter_is_left_alone():
    model = wrap(MLP)
    model.add_adapter("other", settings(seed=1, d=5))
    move(model)
    move(model, "other")
    model.set_adapter("other")
    before = outputs(model, MLP)
    fold(model, "default")
    assert torch.equal(outputs(model, MLP), before)
    assert theta_d(model, "other").shape == (5,)
    fold(model, "other")
    torch.testing.assert_close(outputs(model, MLP), before)


def test_half_precision():
    model = get_peft_model(MLP.model().bfloat16(), settings())
    move(model)
    x = MLP.batch().bfloat16()
    before = model(x)
    fold(model)
    torch.testing.assert_close(model(x), before)
    assert theta_d(model).dtype == torch.float32


def test_a_frozen_adapter_stays_frozen(tmp_path):
    model = wrap(MLP)
    move(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP.model(), tmp_path)
    fold(loaded)
    assert not theta_d(loaded).requires_grad


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda model: None, "the increment of 'default' has length 0.0; train the adapter first"),
        (lambda model: theta_d(model).data.fill_(float("nan")), "has length nan"),
        (lambda model: move(model) or model.merge_adapter(), "must be unmerged to be folded, 'default' is merged"),
    ],
    ids=["zero", "nan", "merged"],
)
def test_what_cannot_be_folded(prepare, message):
    model = wrap(MLP)
    prepare(model)
    before = theta_d(model).detach().clone()
    with pytest.raises(ValueError, match=message):
        fold(model)
    assert torch.equal(theta_d(model), before) or before.isnan().any()
    assert model.peft_config["default"].projection == "fastfood"


def test_what_has_no_one_direction():
    with pytest.raises(
        ValueError,
        match="Only coordinates='weight' have .* 'default' has coordinates='low_rank'; keep its file.* or merge it",
    ):
        fold(wrap(MLP, coordinates="low_rank", rank=2))
    with pytest.raises(
        ValueError, match="`adapter_name` must be that of a SubspaceConfig adapter.*'x'; it has default"
    ):
        fold(wrap(MLP), "x")
    with pytest.raises(ValueError, match="got 'default'; it has none"):
        fold(MLP.model())
    assert isinstance(wrap(MLP).peft_config["default"], SubspaceConfig)
