import pytest
import torch

from recipes.tasks.models import build
from recipes.training.tickets import lottery_ticket, prune, random_ticket


@pytest.mark.parametrize("d", [1, 100, 3466])
def test_a_lottery_ticket_is_the_largest_weights_of_all_tensors(d):
    weights = {name: p.detach() for name, p in build("fc", "digits").named_parameters()}
    mask = lottery_ticket(weights, d)
    stays = torch.cat([weights[name][mask[name]].abs() for name in weights])
    goes = torch.cat([weights[name][~mask[name]].abs() for name in weights])
    assert len(stays) == d
    assert d == 3466 or stays.min() >= goes.max()


def test_a_random_ticket_is_of_the_seed_and_favours_no_tensor():
    network = build("fc", "digits")
    masks = [random_ticket(network, 1000, seed) for seed in (0, 0, 1)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert any(not torch.equal(masks[0][name], masks[2][name]) for name in masks[0])
    assert sum(int(m.sum()) for m in masks[0].values()) == 1000
    assert masks[0]["1.weight"].double().mean() == pytest.approx(1000 / 3466, abs=0.05)


def test_what_is_pruned_is_zero_and_the_rest_stays():
    network, mask = build("fc", "digits"), random_ticket(build("fc", "digits"), 1000, 0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    prune(network, mask)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, torch.where(mask[name], before[name], 0.0))
