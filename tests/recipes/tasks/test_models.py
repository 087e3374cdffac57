from importlib.util import find_spec

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, max_pool2d

from recipes.tasks.models import CLASSES, MODELS, SHAPES, build
from subspace_peft import SubspaceConfig


COUNTS = {
    ("fc", "digits"): 3_466,
    ("fc", "mnist"): 199_210,
    ("fc", "fashion_mnist"): 199_210,
    ("fc", "cifar10"): 1_051_930,
    ("lenet", "digits"): 19_754,
    ("lenet", "mnist"): 44_426,
    ("lenet", "fashion_mnist"): 44_426,
    ("lenet", "cifar10"): 62_006,
    ("untied_lenet", "digits"): 36_734,
    ("untied_lenet", "mnist"): 286_334,
    ("untied_lenet", "cifar10"): 658_238,
    ("fc_lenet", "digits"): 68_606,
    ("fc_lenet", "mnist"): 3_640_574,
    ("fc_lenet", "cifar10"): 16_397_726,
    ("fc_tied_lenet", "digits"): 24_890,
    ("fc_tied_lenet", "mnist"): 193_370,
    ("fc_tied_lenet", "cifar10"): 297_734,
    ("resnet", "digits"): 292_666,
    ("resnet", "cifar10"): 292_954,
    ("conv2", "digits"): 6_090,
    ("conv2", "mnist"): 20_490,
    ("conv2", "fashion_mnist"): 20_490,
    ("conv2", "cifar10"): 25_578,
    ("conv2", "cifar100"): 209_988,
    ("conv2_average", "mnist"): 20_490,
    ("conv3", "digits"): 56_394,
    ("conv3", "mnist"): 61_514,
    ("conv3", "fashion_mnist"): 61_514,
    ("conv3", "cifar10"): 66_570,
    ("conv3", "cifar100"): 158_820,
    ("conv3_average", "cifar10"): 66_570,
    ("resnet20v1", "mnist"): 272_186,
    ("resnet20v1", "fashion_mnist"): 272_186,
    ("resnet20v1", "cifar10"): 272_474,
    ("lenet5", "mnist"): 61_706,
    ("cnn", "mnist"): 408,
    ("resnet8", "cifar10"): 75_290,
    ("resnet20", "cifar10"): 269_722,
    ("resnet32", "cifar100"): 470_004,
    ("resnet9", "cifar10"): 6_573_120,
    ("mlp", "digits"): 5_588_000,
    ("mlp", "mnist"): 5_588_000,
    ("mlp", "fashion_mnist"): 5_588_000,
    ("mlp", "usps"): 5_588_000,
    ("mlp", "cifar10"): 10_164_000,
}


@pytest.mark.parametrize(("name", "dataset"), COUNTS)
def test_parameter_counts_of_the_papers(name, dataset):
    assert sum(p.numel() for p in build(name, dataset).parameters()) == COUNTS[name, dataset]


@pytest.mark.parametrize(
    ("name", "dataset"), [key for key, count in COUNTS.items() if count < 3e5 and key[1] != "fashion_mnist"]
)
def test_D_of_the_wrapped_network_is_its_parameter_count(name, dataset):
    model = get_peft_model(build(name, dataset), SubspaceConfig(d=8, projection="fastjl", target_modules="all"))
    assert COUNTS[name, dataset] == model.peft_config["default"].D


@pytest.mark.parametrize("dataset", [dataset for dataset in SHAPES if dataset != "fashion_mnist"])
@pytest.mark.parametrize("name", MODELS)
def test_every_network_learns_from_every_data_set(name, dataset):
    network = build(name, dataset)
    logits = network(torch.rand(2, *SHAPES[dataset]))
    assert logits.shape == (2, CLASSES[dataset])
    cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert next(network.parameters()).grad.any()


def test_networks_for_fashion_mnist_are_those_for_mnist():
    assert SHAPES["fashion_mnist"] == SHAPES["mnist"]
    assert CLASSES["fashion_mnist"] == CLASSES["mnist"]


def test_a_seed_draws_one_network_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first, same, other = (
        torch.nn.utils.parameters_to_vector(build("fc", "digits", s).parameters()) for s in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_of_conv2_are_as_in_flax():
    for p in build("conv3", "cifar10").parameters():
        if p.ndim == 1:
            assert not p.any()
        else:
            std = p[0].numel() ** -0.5
            assert p.std().item() == pytest.approx(std, rel=0.05)
            assert 2 * std < p.abs().max() <= 2 * std / 0.8796


def test_conv2_pools_by_the_maximum_and_its_variant_by_the_average():
    x = torch.rand(2, *SHAPES["mnist"])
    for name, pool in (("conv2", max_pool2d), ("conv2_average", avg_pool2d)):
        network = build(name, "mnist")
        first, second, head = (network.get_submodule(child) for child in "148")
        assert torch.allclose(network(x), head(pool(second(pool(first(x).relu(), 2)).relu(), 2).flatten(1)), atol=1e-6)


def test_resnet20v1_normalises_by_the_batch_at_hand():
    network, x = build("resnet20v1", "digits"), torch.rand(8, *SHAPES["digits"])
    trained = network(x)
    assert torch.equal(network.eval()(x), trained)
    assert not torch.allclose(network(x[:4]), trained[:4])
    assert not list(network.buffers())


def test_the_mlp_resizes_smaller_images():
    networks = {name: build("mlp", name) for name in ("usps", "mnist")}
    x = torch.rand(2, *SHAPES["usps"])
    resized = interpolate(x, size=28, mode="bilinear")
    assert torch.equal(networks["usps"](x), networks["mnist"](resized))


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
