"""The row of an embedding's `padding_idx` stays at its origin and has no rows in P, as in plain training."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from subspace_peft import compress
from subspace_peft.adapter.walk import unique_coordinates
from subspace_peft.optim import PBFGS
from subspace_peft.projections import PROJECTIONS
from tests.adapter.double import batch, difference_gradient, double, matrix, oracle
from tests.cases import BY_NAME, REPLACED, loss, move, outputs, refused, run, settings, theta_d, train, wrap


CASE = BY_NAME["padded"]
PADDING = {"first.weight": 0, "last.weight": 10, "middle.weight": 2}
D = 3 * 11 * 4
LOW_RANK = {"coordinates": "low_rank", "rank": 2}
THREE_FACTORS = {**LOW_RANK, "factors": 3}


def given(projection: str) -> dict:
    """What a given projection, or identity, needs; the rows of padding in a basis are not zero."""
    generator = torch.Generator().manual_seed(5)
    return {
        "basis": {"basis": torch.linalg.qr(torch.randn(D, 7, generator=generator))[0]},
        "coordinate": {"mask": torch.arange(D) % 3 == 0, "d": None},
        "identity": {"d": None},
    }.get(projection, {})


@pytest.mark.parametrize(
    ("changes", "entries"),
    [({}, 10 * 4), (LOW_RANK, 10 * 2 + 2 * 4), (THREE_FACTORS, 10 * 2 + 2 * 2 + 2 * 4)],
    ids=["weight", "B A", "U W V"],
)
@pytest.mark.parametrize("projection", sorted(PROJECTIONS.keys() - {"basis", "coordinate"}))
def test_the_row_stays_at_its_origin(projection, changes, entries):
    model, base = wrap(CASE, projection=projection, **given(projection), **changes), CASE.model()
    train(model, CASE)
    assert 3 * entries == model.base_model.D
    assert model.base_model.moved_share() == 1
    plain = model.merge_and_unload()
    for name, row in PADDING.items():
        moved, origin = plain.get_parameter(name), base.get_parameter(name)
        assert torch.equal(moved[row], origin[row])
        assert (moved != origin).any(1).sum() == 10


def test_an_origin_of_negative_zeros_stays_to_the_bit():
    model = get_peft_model(nn.Sequential(nn.Embedding(5, 3, padding_idx=1)), settings(target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight[1] = -0.0
    move(model)
    assert layer.moved(["default"])["weight"][1].signbit().all()


@pytest.mark.parametrize("changes", [{}, LOW_RANK, THREE_FACTORS], ids=["weight", "B A", "U W V"])
@pytest.mark.parametrize("name", ["padded", "bert"])
def test_the_gradient_is_the_derivative_of_the_loss(name, changes):
    case = BY_NAME[name]
    model = double(case, target_modules="all", **changes)
    loss(model, batch(case)).backward()
    torch.testing.assert_close(theta_d(model).grad, difference_gradient(model, case), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_gradient_is_the_plain_models(projection):
    """With a given P too, whose rows at the padding may move it: the plain model has no gradient there."""
    model = double(CASE, **{"projection": projection, **given(projection)})
    t = theta_d(model).detach().clone().requires_grad_()
    oracle(model, CASE)(t).backward()
    loss(model, batch(CASE)).backward()
    torch.testing.assert_close(theta_d(model).grad, t.grad, rtol=0, atol=1e-12)


def test_a_given_basis_has_rows_for_all_of_a_tensor():
    model = wrap(CASE, projection="basis", normalization="columns", **given("basis"))
    assert model.base_model.D == D
    P = matrix(model)
    torch.testing.assert_close(torch.cat([P[f"{name}.weight"] for name in ("first", "last", "middle")]).float(),
                               given("basis")["basis"], rtol=1e-5, atol=1e-6)  # fmt: skip


class Bag(nn.Module):
    """Classifies a text by the sum of its tokens' vectors, to which a padding row of zeros adds nothing."""

    def __init__(self):
        super().__init__()
        self.tokens, self.out = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, ids):
        return self.out(torch.tanh(self.tokens(ids).sum(1)))


def texts(padding: int) -> torch.Tensor:
    """Eight texts of five tokens, with this much padding."""
    ids = torch.randint(1, 11, (8, 5), generator=torch.Generator().manual_seed(0))
    return torch.cat([ids, ids.new_zeros(8, padding)], 1)


def bag(**changes) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Bag(), settings(**changes))


def trained(padding: int, **changes) -> tuple[nn.Module, list[int]]:
    """The model after ten steps of P-BFGS on texts with this much padding, and the trials of each step."""
    model, labels, trials = bag(**changes).double(), torch.arange(8) % 3, []
    optimizer = PBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(texts(padding)), labels)
        if torch.is_grad_enabled():
            value.backward()
        return value

    for _ in range(10):
        optimizer.step(closure)
        trials.append(optimizer.state[theta_d(model)]["trials"])
    return model, trials


@pytest.mark.parametrize("changes", [{}, LOW_RANK], ids=["weight", "low rank"])
def test_training_and_logits_depend_on_no_padding(changes):
    model, trials = trained(0, **changes)
    padded, padded_trials = trained(6, **changes)
    torch.testing.assert_close(theta_d(padded), theta_d(model), rtol=1e-9, atol=1e-12)
    assert padded_trials == trials
    with torch.no_grad():
        expected = padded(texts(0))
        assert not torch.allclose(expected, bag().double()(texts(0)), atol=1e-2)
        torch.testing.assert_close(padded(texts(3)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, THREE_FACTORS, {"projection": "identity", "d": None}], ids=str)
def test_the_adapter_is_saved_and_loaded(changes, tmp_path):
    model = wrap(CASE, **changes)
    train(model, CASE)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(CASE.model(), tmp_path).eval()
    assert torch.equal(outputs(loaded, CASE), outputs(model, CASE))
    other = CASE.model()
    other.first.padding_idx = None
    with refused(other, "the first target tensor that differs is `first.weight` of shape"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_tensor_of_padding_alone_is_no_target():
    network = nn.Sequential(nn.Embedding(1, 4, padding_idx=0), nn.Linear(4, 3))
    model = get_peft_model(network, settings(target_modules=["0", "1"]))
    assert list(unique_coordinates(model, "default")) == ["1.weight", "1.bias"]


def test_a_tied_tensor_with_two_rows_of_padding_is_refused():
    model = CASE.model()
    model.first.weight = model.middle.weight
    with refused(model, r"must have one row of padding, `first.weight` .* padding_idx \[0, 2\]; set them"):
        get_peft_model(model, settings())


@pytest.mark.parametrize("start", ["svd", "orthogonal", "random"])
@pytest.mark.parametrize("factors", [2, 3])
def test_a_replaced_row_of_padding_stays_zero(start, factors):
    torch.manual_seed(0)
    model = get_peft_model(Bag(), settings(**REPLACED, target_modules=["tokens"], start=start, factors=factors))
    move(model, size=0.5)
    layer = model.base_model.model.tokens
    assert layer.moved(["default"])["weight"][0].count_nonzero() == 0
    with torch.no_grad():
        expected = model(texts(0))
        torch.testing.assert_close(model(texts(4)), expected)
        torch.testing.assert_close(run(compress(model), texts(4)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["svd", "orthogonal", "random"])
def test_a_row_of_padding_that_is_not_zero_cannot_be_replaced(start):
    model = CASE.model()
    with refused(model, "A row of padding must be zero to be replaced, row 0 of `first.weight` is not; set it"):
        get_peft_model(model, settings(**REPLACED, target_modules=["first"], start=start))


def test_the_factors_have_no_rows_for_padding():
    for name, coordinates in unique_coordinates(wrap(CASE, **LOW_RANK), "default").items():
        assert coordinates.projections[".B"].rows.n == 10 * 2
        left, _ = coordinates.factors(torch.ones(7))
        assert left.shape == (11, 2)
        assert left[PADDING[name]].count_nonzero() == 0
