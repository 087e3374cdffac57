"""parameter_groups: theta_d and the head at rates of their own."""

import pytest
import torch

from subspace_peft import parameter_groups
from tests.cases import BY_NAME, loss, settings, theta_d, wrap


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
    with pytest.raises(ValueError, match="must have a theta_d that trains, found none; wrap it"):
        parameter_groups(CASE.model(), lr=1e-3)
    with pytest.raises(ValueError, match="found none"):
        parameter_groups(wrap(CASE, inference_mode=True), lr=1e-3)
