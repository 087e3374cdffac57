"""Class gradients (1) and the weights of the low-rank Hessian (3) against a loop over the examples."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from subspace_peft.optim import class_gradients
from tests.cases import BY_NAME, theta_d, wrap
from tests.optim.classes import C, by_loop, data, network


def test_they_are_those_of_a_loop():
    model, (x, y) = network(), data()
    c, weight = by_loop(model, x, y)
    found = class_gradients(model(x), y, model.parameters())
    torch.testing.assert_close(found.c, c)
    torch.testing.assert_close(found.weight, weight)
    p = model(x).detach().softmax(1)
    torch.testing.assert_close(found.weight_of_all, (p * (1 - p)).mean(0))
    assert found.count.tolist() == torch.bincount(y, minlength=C).tolist()


def test_a_class_that_the_batch_lacks_is_zero():
    model, (x, y) = network(), data()
    found = class_gradients(model(x), y.clamp(max=2), model.parameters())
    assert found.count[3] == 0
    assert found.weight[3] == 0
    assert not found.c[3].any()
    assert found.c[2].any()


def test_tokens_are_examples_and_ignored_labels_are_none():
    model, (x, y) = network(), data()
    whole = class_gradients(model(x), y, model.parameters())
    tokens, labels = torch.cat([x, x[:3]]).view(3, 5, 5), torch.cat([y, torch.tensor([-100] * 3)]).view(3, 5)
    found = class_gradients(model(tokens), labels, model.parameters())
    for name in ("c", "weight", "weight_of_all", "count"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))


@pytest.mark.parametrize("name", ["convnet", "bert"])
def test_of_theta_d_through_any_network(name):
    """By the batching rules of every layer and of the projection: P^T c_k of the weights that P moves."""
    case = BY_NAME[name]
    model = wrap(case)
    vector, x = theta_d(model), case.batch()
    logits = model(x)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    y = torch.tensor([0, 1, 1])
    found = class_gradients(logits, y, [vector])
    for k, members in enumerate(([0], [1, 2])):
        (expected,) = torch.autograd.grad(logits[members, k].mean(), vector, retain_graph=True)
        torch.testing.assert_close(found.c[k], expected)


def test_parameters_that_the_logits_do_not_depend_on():
    model, (x, y) = network(), data()
    unused = nn.Parameter(torch.zeros(3).double())
    found = class_gradients(model(x), y, [unused, model[0].bias])
    assert not found.c[:, :3].any()
    torch.testing.assert_close(found.c[:, 3:], by_loop(model, x, y)[0][:, 30:36])


def test_through_checkpoints():
    """A reentrant one hides the parameters within: their class gradients would be zero, and they would not train."""
    model, (x, y) = network(), data()
    whole = class_gradients(model(x), y, model.parameters()).c
    x.requires_grad_()
    parts = [model[2](checkpoint(model[:2], x, use_reentrant=reentrant)) for reentrant in (False, True)]
    torch.testing.assert_close(class_gradients(parts[0], y, model.parameters()).c, whole)
    with pytest.raises(ValueError, match="without reentrant checkpoints.*use_reentrant=False"):
        class_gradients(parts[1], y, model.parameters())


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            torch.ones(3, 2, requires_grad=True),
            torch.tensor([0, 1, 2]),
            "below the 2 logits.*more classes than logits",
        ),
        (torch.ones(3, 2, requires_grad=True), torch.tensor([0, 1, -1]), "must be at least 0"),
        (torch.ones(3, requires_grad=True), torch.tensor([0, 1, 1]), "`logits` must be \\[..., C\\]"),
        (torch.ones(3, 2, requires_grad=True), torch.tensor([0, 1]), "got \\[3, 2\\] and \\[2\\]"),
        (torch.ones(3, 2, requires_grad=True), torch.tensor([0.0, 1, 1]), "`labels` must be whole numbers"),
        (torch.ones(3, 2), torch.tensor([0, 1, 1]), "`logits` must come with their graph"),
    ],
)
def test_logits_and_labels_that_do_not_fit(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        class_gradients(logits, labels, [logits])
