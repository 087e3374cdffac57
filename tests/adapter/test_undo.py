"""Undo: whatever fails while a model is wrapped leaves it as it was."""

import inspect
import sys
from pathlib import Path

import peft
import pytest
from peft import get_peft_model

import subspace_peft
from tests.cases import BY_NAME, assert_same_state, base_outputs, outputs, settings, tensors, tree, wrap


SOURCES = tuple(str(Path(package.__file__).parent) for package in (subspace_peft, peft))


class BrokenError(Exception):
    pass


class Calls:
    """Counts the calls of functions of the package and of PEFT, and makes one of them fail."""

    def __init__(self, fails: int | None = None):
        self.count, self.fails = 0, fails

    def __call__(self, frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(SOURCES) and is_wrapping(frame):
            self.count += 1
            if self.count == self.fails:
                raise BrokenError
        return

    def __enter__(self):
        sys.settrace(self)

    def __exit__(self, *exception):
        sys.settrace(None)


def is_wrapping(frame) -> bool:
    """Whether it is called by `inject_adapter`, which does all that touches the model, and is not the undoing."""
    if frame.f_code.co_flags & inspect.CO_GENERATOR:  # an error while one is closed is lost
        return False
    callers = set()
    while frame := frame.f_back:
        callers.add(frame.f_code.co_name)
    return "inject_adapter" in callers and not callers & {"undone_if_it_fails", "__enter__", "__exit__"}


def wrap_whole(model):
    return get_peft_model(model, settings(target_modules=["conv1", "bn1"], modules_to_save=["head"]))


def everything(model):
    trained = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return tree(model), trained, type(model), sorted(vars(model)), [len(m._forward_pre_hooks) for m in model.modules()]


def test_every_step_of_wrapping_can_fail():
    case = BY_NAME["convnet"]
    calls = Calls()
    with calls:
        wrap_whole(case.model())
    model, failed = case.model(), 0
    before, state = everything(model), tensors(model)
    for step in range(1, calls.count + 1, max(1, calls.count // 60)):
        try:
            with Calls(fails=step):
                wrap_whole(model)
        except BrokenError:
            failed += 1
            assert everything(model) == before, step
            assert_same_state(model, state)
    assert failed > 40
    wrap_whole(model)


def test_every_step_of_adding_an_adapter_can_fail():
    case = BY_NAME["convnet"]
    model, calls = wrap(case), Calls()
    with calls:
        model.add_adapter("other", settings(seed=1))
    model = wrap(case)
    before, state, expected = everything(model), tensors(model), outputs(model, case)
    for step in range(1, calls.count, max(1, calls.count // 40)):
        with pytest.raises(BrokenError), Calls(fails=step):
            model.add_adapter("other", settings(seed=1))
        assert everything(model) == before, step
        assert_same_state(model, state)
        assert list(model.peft_config) == ["default"]
    assert (outputs(model, case) == expected).all()
    model.add_adapter("other", settings(seed=1))
    model.set_adapter("other")
    assert (outputs(model, case) == base_outputs(case)).all()


def test_a_class_of_another_library_with_the_name_of_one_of_torchs():
    """Its attributes have other names than PEFT expects of a class that is called Linear."""
    import torch
    from torch import nn

    class Linear(nn.Module):
        def __init__(self, in_channels, out_channels):
            super().__init__()
            self.in_channels, self.out_channels = in_channels, out_channels
            self.weight = nn.Parameter(torch.randn(out_channels, in_channels))

        def forward(self, x):
            return x @ self.weight.T

    base = nn.Sequential(Linear(4, 3))
    x = torch.randn(2, 4)
    expected = base(x)
    assert torch.equal(get_peft_model(base, settings())(x), expected)
