"""Root: the children of an adapted model are what they were, and its copies own their theta_d."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from subspace_peft.adapter.layer import SubspaceLayer
from tests.cases import BY_NAME, assert_same_state, move, outputs, run, settings, tensors, theta_d, train, wrap


CASE = BY_NAME["sequential"]


def adapted():
    """An adapted nn.Sequential, and the PeftModel around it."""
    model = wrap(CASE)
    move(model, size=0.3)
    return model.base_model.model, model


def test_a_sequential_is_sliced_indexed_and_iterated_as_before():
    net, model = adapted()
    x = CASE.batch()
    assert len(net) == 3
    assert [type(child) for child in net] == [SubspaceLayer, nn.ReLU, SubspaceLayer]
    assert net[-1] is list(net)[2]
    assert type(net[:-1]) is nn.Sequential
    for features in (net[:-1], nn.Sequential(*list(net.children())[:-1])):
        assert torch.equal(net[-1](features(x)), model(x))
    net.append(nn.Tanh())
    assert len(net) == 4
    assert torch.equal(net(x), model(x))
    assert isinstance(net[3], nn.Tanh)


def test_children_are_removed_and_inserted_as_before():
    net, model = adapted()
    plain, x = copy.deepcopy(model).merge_and_unload(), CASE.batch()
    for change in (
        lambda children: children.insert(1, nn.Tanh()),
        lambda children: children.__delitem__(-1),
        lambda children: children.pop(2),
        lambda children: children.__delitem__(slice(1, None)),
    ):
        change(net)
        change(plain)
        assert len(net) == len(plain)
        torch.testing.assert_close(model(x), plain(x))
    assert theta_d(model).numel() == 7
    container = nn.ModuleDict({"a": nn.Linear(2, 2)})
    get_peft_model(container, settings(d=2))
    container.clear()
    assert not container
    assert theta_d(container).numel() == 2


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
def test_other_containers_too(kind):
    parts = {"a": nn.Linear(2, 2), "b": nn.ReLU()}
    container = kind(parts if kind is nn.ModuleDict else parts.values())
    before = list(container)
    get_peft_model(container, settings(d=2))
    assert len(container) == 2
    if kind is nn.ModuleDict:
        assert list(container) == list(container.keys()) == before
        assert [name for name, _ in container.items()] == before
        assert "subspace_vectors" not in container
    else:
        assert container[-1] is before[-1]


def test_the_class_keeps_its_name_and_comes_back():
    plain = CASE.model()
    model = get_peft_model(plain, settings())
    assert isinstance(plain, nn.Sequential)
    assert type(plain).__name__ == type(plain).__qualname__ == "Sequential"
    assert [name for name, _ in plain.named_children()] == ["0", "1", "2"]
    assert "subspace_vectors" in dict(plain.named_modules())
    model.unload()
    assert type(plain) is nn.Sequential
    assert not plain._forward_pre_hooks


def test_the_vectors_are_converted_and_listed_with_the_model():
    net, model = adapted()
    assert "model.subspace_vectors" in dict(model.base_model.named_children())
    for module in (net, model):
        assert theta_d(module) in set(module.parameters())
        module.double()
        assert theta_d(model).dtype == torch.float64
        module.float()
        assert theta_d(model).dtype == torch.float32
        assert not theta_d(model).is_meta


def test_batch_norms_are_converted_to_synchronised_ones():
    case = BY_NAME["convnet"]
    model = wrap(case)
    move(model, size=0.3)
    expected, before = outputs(model, case), tensors(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    assert_same_state(converted, before)
    assert torch.equal(outputs(converted, case), expected)


def test_an_injected_adapter_shows_its_vectors_among_the_children():
    """Nothing else holds them there for those who shard a model child by child."""
    model = inject_adapter_in_model(settings(), BY_NAME["mlp"].model())
    assert "subspace_vectors" in dict(model.named_children())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["sequential", "convnet", "llama"])
def test_a_copy_has_a_theta_d_of_its_own(name, copied):
    case = BY_NAME[name]
    model = wrap(case)
    move(model, size=0.3)
    twin = copied(model)
    expected = outputs(model, case)
    assert torch.equal(outputs(twin, case), expected)
    train(twin, case)
    assert torch.equal(outputs(model, case), expected)
    assert not torch.equal(outputs(twin, case), expected)
    assert [type(m).__name__ for m in twin.modules()] == [type(m).__name__ for m in model.modules()]
    twin.unload()


def clone_module(module: nn.Module) -> nn.Module:
    """As meta-learning libraries clone: each module anew, with clones of its parameters."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {k: p if p is None else p.clone() for k, p in module._parameters.items()}
    clone._buffers = {k: b if b is None else b.clone() for k, b in module._buffers.items()}
    clone._modules = {k: m if m is None else clone_module(m) for k, m in module._modules.items()}
    return clone


def test_a_clone_made_module_by_module_runs_with_its_own_theta_d():
    _, model = adapted()
    x = CASE.batch()
    clone = clone_module(model)
    torch.testing.assert_close(clone(x), model(x))
    loss = clone(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, theta_d(model))
    vectors = clone.base_model.model._modules["subspace_vectors"].subspace_peft_theta_d
    name, adapted_vector = next((n, p) for n, p in vectors.named_parameters())
    owner = vectors.get_submodule(name.rpartition(".")[0])
    owner._parameters[name.rpartition(".")[2]] = adapted_vector - 0.1 * gradient
    with torch.no_grad():
        step = model(x)
        theta_d(model).sub_(0.1 * gradient)
        torch.testing.assert_close(clone(x), model(x))
        assert not torch.equal(model(x), step)


def test_functional_call_and_stacked_states_use_the_given_theta_d():
    models = [wrap(CASE) for _ in range(3)]
    for seed, model in enumerate(models):
        move(model, size=0.3, seed=seed)
    x = CASE.batch()
    parameters, buffers = torch.func.stack_module_state(models)
    base = models[0]

    def call(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    with torch.no_grad():
        stacked = torch.vmap(call)(parameters, buffers)
        for out, model in zip(stacked, models, strict=True):
            torch.testing.assert_close(out, model(x))


def test_an_average_of_models_averages_theta_d():
    model = wrap(CASE)
    average = torch.optim.swa_utils.AveragedModel(model)
    for seed in range(3):
        move(model, size=0.3, seed=seed)
        average.update_parameters(model)
    vectors = [theta_d(model).clone() for seed in range(3) if move(model, size=0.3, seed=seed) is None]
    torch.testing.assert_close(theta_d(average), torch.stack(vectors).mean(0))
    with torch.no_grad():
        theta_d(model).copy_(theta_d(average))
        assert torch.equal(average(CASE.batch()), run(model, CASE.batch()))


def test_a_copy_of_one_layer_runs_with_a_theta_d_of_its_own():
    net, model = adapted()
    layer, x = net[0], CASE.batch()
    twin = copy.deepcopy(layer)
    before = layer(x)
    assert torch.equal(twin(x), before)
    move(model, size=1.0)
    assert torch.equal(twin(x), before)
    assert any(p.shape == (7,) and p.requires_grad for p in twin.parameters())


@pytest.mark.parametrize("part", [lambda net: net[:], lambda net: nn.ModuleList([net[2], net[0]])])
def test_a_copy_of_a_part_of_the_model_has_one_theta_d_of_its_own(part):
    net, model = adapted()
    twin = copy.deepcopy(part(net))
    (own,) = (p for p in twin.parameters() if p.requires_grad)
    assert own is not theta_d(model)
    before = {layer: layer.weight.detach().clone() for layer in (*twin, *net) if isinstance(layer, SubspaceLayer)}
    with torch.no_grad():
        own.mul_(2)
    for layer, weight in before.items():
        assert torch.equal(layer.weight, weight) == (layer in set(net))
