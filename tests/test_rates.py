"""Learning rates of theta_d and the head, and of the outer and inner factors."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import pad

from subspace_peft import SubspaceConfig, find_rates, gamma_for, parameter_groups
from subspace_peft.adapter.walk import unique_coordinates
from subspace_peft.sensitivity import sensitivity
from tests.cases import BY_NAME, loss, settings, theta_d, wrap
from tests.models import llama


CASE = BY_NAME["mlp"]


def test_theta_d_and_head():
    model = wrap(CASE, target_modules=["fc1"], modules_to_save=["fc2"])
    vector, head = parameter_groups(model, lr=1e-3, head_lr=3e-2, weight_decay=0.1)
    assert vector == {"params": [theta_d(model)], "lr": 1e-3, "weight_decay": 0.0}
    assert [p.shape for p in head["params"]] == [(4, 10), (4,)]
    assert (head["lr"], head["weight_decay"]) == (3e-2, 0.1)
    before = [p.detach().clone() for p in (*vector["params"], *head["params"])]
    optimizer = torch.optim.AdamW([vector, head])
    loss(model, CASE.batch()).backward()
    optimizer.step()
    for old, new, lr in zip(before, (*vector["params"], *head["params"]), (1e-3, 3e-2, 3e-2), strict=True):
        assert (new - old).abs().max().item() == pytest.approx(lr, rel=0.25)


def test_the_heads_rate_if_left_out_and_no_head():
    model = wrap(CASE, target_modules=["fc1"], modules_to_save=["fc2"])
    assert parameter_groups(model, lr=1e-3)[1]["lr"] == 1e-2
    assert len(parameter_groups(wrap(CASE), lr=1e-3)) == 1


def test_all_adapters_that_train():
    model = wrap(CASE, "one")
    model.add_adapter("two", settings(seed=1))
    model.base_model.set_adapter(["one", "two"])
    assert len(parameter_groups(model, lr=1e-3)[0]["params"]) == 2


def test_without_theta_d():
    with pytest.raises(ValueError, match="must have a trainable theta_d, it has none; wrap it"):
        parameter_groups(CASE.model(), lr=1e-3)
    with pytest.raises(ValueError, match="must have a trainable theta_d, it has none"):
        parameter_groups(wrap(CASE, inference_mode=True), lr=1e-3)


def test_the_rate_follows_from_the_sensitivity_the_steps_and_d():
    model = wrap(CASE, d=16)
    batch = CASE.batch()
    s = sensitivity(model, batch).theta_d
    for steps, expected in ((625, 3.6 / s / 10), (10_000, 3.6 / s / 20), (7, 3.6 / s / 1600**0.25)):
        assert find_rates(model, batch, steps).theta_d == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="`steps` must be the number of updates of the training, at least 1, got 0"):
        find_rates(model, batch, 0)


def test_groups_without_numbers():
    model, batch = wrap(CASE, target_modules=["fc1"], modules_to_save=["fc2"]), CASE.batch()
    rate, head = find_rates(model, batch, 300)
    assert head == pytest.approx(1.5 / sensitivity(model, batch).head)
    assert [group["lr"] for group in parameter_groups(model, batch=batch, steps=300)] == [rate, head]
    groups = parameter_groups(model, head_lr=0.5, batch=batch, steps=300)
    assert [group["lr"] for group in groups] == [rate, 0.5]
    with pytest.raises(ValueError, match="must be given `batch` and `steps`, .* got neither `lr` nor `steps`"):
        parameter_groups(model, batch=batch)


def test_the_rate_that_is_found_learns():
    losses = {}
    for factor in (0.03, 1.0):
        model, batch = wrap(CASE), CASE.batch()
        optimizer = torch.optim.AdamW(parameter_groups(model, factor * find_rates(model, batch, 100).theta_d))
        for _ in range(100):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        losses[factor] = loss(model, batch).item()
    assert losses[1.0] < losses[0.03] / 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_rate(side):
    model = get_peft_model(llama().eval(), SubspaceConfig(d=16, target_modules="all-linear"))
    ids = torch.randint(3, 23, (6, 9), generator=torch.Generator().manual_seed(0))
    padding = (4, 0) if side == "left" else (0, 4)
    padded = {"input_ids": pad(ids, padding), "attention_mask": pad(torch.ones_like(ids), padding)}
    rate = find_rates(model, {"input_ids": ids}, 100).theta_d
    assert find_rates(model, padded, 100).theta_d == pytest.approx(rate, rel=1e-3)
    labels = {"labels": pad(ids, padding, value=-100)}
    assert find_rates(model, padded | labels, 100).theta_d == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("name", ["labels", "completion_mask"])
def test_outputs_that_the_loss_does_not_read_move_no_rate(name):
    """The rate is that of the last three outputs: of two tokens of an answer, and of the one before."""
    model = get_peft_model(llama().eval(), SubspaceConfig(d=16, target_modules="all-linear"))
    ids = torch.randint(3, 23, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) > 6).expand(6, 9).long()
    batch = {"labels": ids.where(mask > 0, -100)} if name == "labels" else {"completion_mask": mask}
    last = find_rates(model, {"input_ids": ids}, 100, lambda model, batch: model(**batch).logits[:, -3:])
    found = find_rates(model, batch | {"input_ids": ids}, 100, lambda model, batch: model(batch["input_ids"]))
    assert found == pytest.approx(last, rel=1e-6)
    assert found != pytest.approx(find_rates(model, {"input_ids": ids}, 100), rel=1e-2)
    ignored = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    assert find_rates(model, ignored, 100) == find_rates(model, {"input_ids": ids}, 100)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.02, "eps": 1e-16}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-16}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_outer_factors_train_as_in_a_parameter_group_of_their_own(name):
    kind, options = OPTIMIZERS[name]
    rate = 0.04
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    config = {"coordinates": "low_rank", "rank": 2, "replace_weight": True, "factors": 3, "projection": "identity"}
    ours = get_peft_model(
        network, SubspaceConfig(**config, gamma=gamma_for(rate, kind), target_modules=["0"])
    ).double()
    start = next(iter(unique_coordinates(ours, "default").values())).start(torch.device("cpu"))
    U, W, V = (nn.Parameter(factor.double()) for factor in start)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    groups = [{"params": [W]}, {"params": [U, V], "lr": rate * options["lr"]}]
    by_groups = kind(groups, **options)
    by_gamma = kind([p for p in ours.parameters() if p.requires_grad], **options)
    for _ in range(6):
        for optimizer, predict in ((by_groups, lambda: x @ (U @ W @ V).mT), (by_gamma, lambda: ours(x))):
            optimizer.zero_grad()
            (predict() - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), x @ (U @ W @ V).mT, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(U, start[0].double(), atol=1e-4)


@pytest.mark.parametrize(
    ("rate", "kind", "message"),
    [
        (-0.1, torch.optim.SGD, "`rate` must be a finite number of at least 0, got -0.1"),
        (
            float("nan"),
            torch.optim.Adam,
            "`rate` must be a finite number of at least 0, got nan; 1 trains all factors alike",
        ),
        (0.1, torch.optim.LBFGS, "known to scale with the gradient or not at all .*, got LBFGS; set `gamma` by hand"),
        (0.1, "sgd", "got str; set `gamma` by hand"),
    ],
)
def test_rates_without_a_gamma(rate, kind, message):
    with pytest.raises(ValueError, match=message):
        gamma_for(rate, kind)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimiser_is_as_good_as_its_class(kind):
    assert gamma_for(0.04, kind([nn.Parameter(torch.zeros(1))], lr=1e-2)) == gamma_for(0.04, kind)
