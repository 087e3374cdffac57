from importlib.util import find_spec

import pytest
import torch

from recipes.models import CLASSES, SHAPES, build


COUNTS = {
    ("fc", "digits"): 3_466,
    ("fc", "mnist"): 199_210,
    ("fc", "fashion_mnist"): 199_210,
    ("fc", "cifar10"): 1_051_930,
    ("lenet", "digits"): 19_754,
    ("lenet", "mnist"): 44_426,
    ("lenet", "fashion_mnist"): 44_426,
    ("lenet", "cifar10"): 62_006,
    ("lenet5", "mnist"): 61_706,
    ("cnn", "mnist"): 408,
    ("resnet8", "cifar10"): 75_290,
    ("resnet20", "cifar10"): 269_722,
    ("resnet32", "cifar100"): 470_004,
    ("resnet9", "cifar10"): 6_573_120,
}


@pytest.mark.parametrize(("name", "dataset"), COUNTS)
def test_parameter_counts_of_the_papers(name, dataset):
    network = build(name, dataset)
    assert sum(p.numel() for p in network.parameters()) == COUNTS[name, dataset]
    assert network(torch.rand(2, *SHAPES[dataset])).shape == (2, CLASSES[dataset])


def test_a_seed_draws_one_network_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first, same, other = (
        torch.nn.utils.parameters_to_vector(build("fc", "digits", s).parameters()) for s in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="`model` must be one of fc, lenet, .* or timm/<name>, got 'lenett'"):
        build("lenett", "mnist")
    with pytest.raises(ValueError, match="`dataset` must be one of .*digits.*, got 'mnists'"):
        build("lenet", "mnists")


def test_networks_of_timm_say_what_to_install():
    if find_spec("timm"):
        pytest.skip("timm is installed")
    with pytest.raises(ImportError, match="pip install timm"):
        build("timm/vgg11_bn", "cifar100")
