"""Full space: the weights around a basis, and P+-BFGS on a PEFT model."""

import pytest
import torch
from peft import get_peft_model

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.full_space import full_space
from subspace_peft.optim import PPlusBFGS
from tests.cases import BY_NAME, dense_P, loss, move, run, settings, theta_d


def wrapped(name: str, k: int = 3, **changes):
    model = BY_NAME[name].model()
    D = sum(p.numel() for p in model.parameters())
    basis, _ = torch.linalg.qr(torch.randn(D, k, generator=torch.Generator().manual_seed(0)))
    config = {"projection": "basis", "basis": basis, "d": None, "normalization": "columns"}
    return get_peft_model(model, settings(**config | changes)).eval()


@pytest.mark.parametrize("name", ["mlp", "tied", "convnet", "shared_modules"])
def test_weights_and_lift(name):
    """lift(theta_d) is the increment of the layers, with each tensor once; the columns of P are orthonormal."""
    model = wrapped(name)
    assert all(not p.requires_grad for n, p in model.named_parameters() if "theta_d" not in n)
    weights, lift = full_space(model)
    assert all(weight.requires_grad for weight in weights)
    assert len(set(weights)) == len(weights)
    assert sum(weight.numel() for weight in weights) == model.base_model.D
    move(model)
    P = torch.cat(list(dense_P(model).values()))
    lifted = torch.cat([tensor.flatten() for tensor in lift(theta_d(model).detach())])
    torch.testing.assert_close(lifted, (P @ theta_d(model)).detach())
    torch.testing.assert_close(P.T @ P, torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mlp", "tied", "convnet"])
def test_the_gradient_of_theta_d_is_that_of_the_weights_projected(name):
    model, case = wrapped(name), BY_NAME[name]
    weights, lift = full_space(model)
    move(model)
    loss(model, case.batch()).backward()
    inside = lift(theta_d(model).grad)
    outside = torch.cat([(w.grad - part).flatten() for w, part in zip(weights, inside, strict=True)])
    P = torch.cat(list(dense_P(model).values()))
    assert outside.norm().item() > 1e-2
    torch.testing.assert_close(P.T @ outside, torch.zeros(3), atol=1e-5 * outside.norm().item(), rtol=0)


def test_pplus_trains_a_model_that_is_saved_merged():
    case = BY_NAME["mlp"]
    model, x = wrapped("mlp"), case.batch()
    weights, lift = full_space(model)
    before = [weight.detach().clone() for weight in weights]
    optimizer = PPlusBFGS([theta_d(model)], weights, lift)

    def closure():
        optimizer.zero_grad()
        value = run(model, x).square().mean()
        if torch.is_grad_enabled():
            value.backward()
        return value

    losses = [optimizer.step(closure).item() for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
    assert theta_d(model).any()
    assert not any(map(torch.equal, before, weights))
    trained = run(model, x).detach()
    torch.testing.assert_close(run(model.merge_and_unload(), x), trained)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization": "rows"},
        {"projection": "fastfood", "basis": None, "d": 3},
        {"projection": "identity", "basis": None},
    ],
    ids=str,
)
def test_other_adapters_are_refused_and_stay_frozen(changes):
    model = wrapped("mlp", **changes)
    with pytest.raises(ValueError, match="projection='basis', coordinates='weight', normalization='columns', got"):
        full_space(model)
    assert sum(p.requires_grad for p in model.parameters()) == 1


def test_a_base_in_half_precision_is_refused():
    case = BY_NAME["mlp"]
    model = case.model().bfloat16()
    basis, _ = torch.linalg.qr(torch.randn(114, 2, generator=torch.Generator().manual_seed(0)))
    config = SubspaceConfig(projection="basis", basis=basis, target_modules="all", normalization="columns")
    model = get_peft_model(model, config)
    with pytest.raises(ValueError, match="The base must be in float32 or float64 to train, `fc1.weight` is"):
        full_space(model)
    assert sum(p.requires_grad for p in model.parameters()) == 1
