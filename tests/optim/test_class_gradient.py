"""Class gradients, equation (1), and the weights of equation (3), against a loop over the examples."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from subspace_peft.optim import class_gradients
from tests.cases import BY_NAME, theta_d, wrap
from tests.optim.classes import C, by_loop, data, network


def test_a_loop_gives_the_same():
    model, (x, y) = network(), data()
    c, weight = by_loop(model, x, y)
    gradients = class_gradients(model(x), y, model.parameters())
    torch.testing.assert_close(gradients.c, c)
    torch.testing.assert_close(gradients.weight, weight)
    p = model(x).detach().softmax(1)
    torch.testing.assert_close(gradients.weight_of_all, (p * (1 - p)).mean(0))
    assert gradients.count.tolist() == torch.bincount(y, minlength=C).tolist()


def test_a_class_without_examples_is_zero():
    model, (x, y) = network(), data()
    gradients = class_gradients(model(x), y.clamp(max=2), model.parameters())
    assert gradients.count[3] == 0
    assert gradients.weight[3] == 0
    assert not gradients.c[3].any()
    assert gradients.c[2].any()


def test_tokens_are_examples_except_ignored_ones():
    model, (x, y) = network(), data()
    whole = class_gradients(model(x), y, model.parameters())
    tokens, labels = torch.cat([x, x[:3]]).view(3, 5, 5), torch.cat([y, torch.tensor([-100] * 3)]).view(3, 5)
    gradients = class_gradients(model(tokens), labels, model.parameters())
    for name in ("c", "weight", "weight_of_all", "count"):
        torch.testing.assert_close(getattr(gradients, name), getattr(whole, name))


@pytest.mark.parametrize("name", ["convnet", "bert"])
def test_gradients_in_theta_d(name):
    """P^T c_k of the weights that P moves: every layer and the projection have batching rules."""
    case = BY_NAME[name]
    model = wrap(case)
    vector, x = theta_d(model), case.batch()
    logits = model(x)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    y = torch.tensor([0, 1, 1])
    gradients = class_gradients(logits, y, [vector])
    for k, members in enumerate(([0], [1, 2])):
        (expected,) = torch.autograd.grad(logits[members, k].mean(), vector, retain_graph=True)
        torch.testing.assert_close(gradients.c[k], expected)


@pytest.mark.parametrize("coordinates", [{}, {"coordinates": "low_rank", "rank": 2}], ids=["weight", "low_rank"])
@pytest.mark.parametrize("projection", ["dense", "sparse", "fastfood", "fastjl", "kronecker"])
def test_torch_can_batch_the_products_through_every_projection(projection, coordinates):
    case = BY_NAME["mlp"]
    model = wrap(case, projection=projection, **coordinates)
    vector, logits = theta_d(model), model(case.batch()).sum(0)
    units = torch.eye(len(logits))
    (batched,) = torch.autograd.grad(logits, vector, units, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(logits, vector, unit, retain_graph=True)[0] for unit in units]
    torch.testing.assert_close(batched, torch.stack(rows))


def test_parameters_without_effect_on_the_logits():
    model, (x, y) = network(), data()
    unused = nn.Parameter(torch.zeros(3).double())
    gradients = class_gradients(model(x), y, [unused, model[0].bias])
    assert not gradients.c[:, :3].any()
    torch.testing.assert_close(gradients.c[:, 3:], by_loop(model, x, y)[0][:, 30:36])


def test_checkpoints():
    """A reentrant checkpoint hides the parameters inside: their class gradients would be zero."""
    model, (x, y) = network(), data()
    whole = class_gradients(model(x), y, model.parameters()).c
    x.requires_grad_()
    parts = [model[2](checkpoint(model[:2], x, use_reentrant=reentrant)) for reentrant in (False, True)]
    torch.testing.assert_close(class_gradients(parts[0], y, model.parameters()).c, whole)
    with pytest.raises(ValueError, match="without reentrant checkpoints.*use_reentrant=False"):
        class_gradients(parts[1], y, model.parameters())


def test_a_checkpoint_with_dropout():
    """It draws random numbers again, which torch cannot do in a batch of products."""
    model, (x, y) = network(), data()
    unused = nn.Parameter(torch.zeros(3).double())

    def logits(checkpointed):
        torch.manual_seed(0)
        body = lambda x: nn.functional.dropout(model[:2](x), 0.5)  # noqa: E731
        return model[2](checkpoint(body, x, use_reentrant=False) if checkpointed else body(x))

    found, expected = (class_gradients(logits(each), y, [*model.parameters(), unused]).c for each in (True, False))
    torch.testing.assert_close(found, expected)


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
