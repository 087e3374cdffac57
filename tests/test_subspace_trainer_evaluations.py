"""The evaluations of an update of SubspaceTrainer: one function, the loss of Trainer, none too many; and refusals."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.optim import LBFGS
from transformers import TrainerCallback

from subspace_peft import SubspaceTrainer
from subspace_peft.optim import PBFGS
from tests import distributed_trainer as distributed
from tests.cases import BY_NAME, theta_d, wrap
from tests.distributed_trainer import Rows, arguments, calls, logged, net, trainer


# without an accelerator the loader warns that it was told to pin memory
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


class Probe(torch.optim.Optimizer):
    """Evaluates as a line search does, records the results, then makes a step down the gradient."""

    needs_closure = True

    def __init__(self, params, lr=0.1, trials=3, record=None):
        super().__init__(params, {"lr": lr})
        self.trials, self.record = trials, record if record is not None else []

    @torch.no_grad()
    def step(self, closure):
        (theta_d,) = self.param_groups[0]["params"]
        theta_d.grad = None
        with torch.enable_grad():
            results = [(closure().item(), theta_d.grad.clone())]
        start = theta_d.clone()
        for _ in range(self.trials):
            theta_d.add_(1.0)
            closure()
            theta_d.copy_(start)
        if self.trials:
            results.append((closure().item(), results[0][1]))
            with torch.enable_grad():
                results.append((closure().item(), theta_d.grad.clone()))
        self.record.append(results)
        theta_d.sub_(results[0][1], alpha=self.param_groups[0]["lr"])


class Logits(torch.optim.Optimizer):
    """Needs the logits and their graph, as ClassGradientNewton does."""

    needs_closure = needs_logits = True

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.record = []

    def step(self, closure):
        (theta_d,) = self.param_groups[0]["params"]
        loss, logits, labels = closure()
        (gradient,) = torch.autograd.grad(loss, theta_d, retain_graph=True)
        assert torch.autograd.grad(logits[:, 0].sum(), theta_d)[0].any()
        self.record.append((loss.item(), F.cross_entropy(logits, labels).item(), gradient))
        with torch.no_grad():
            theta_d.sub_(gradient, alpha=self.param_groups[0]["lr"])


def test_losses_per_token_are_accumulated_as_in_trainer(tmp_path):
    """A causal model gets the number of tokens of the update: the mean of the micro-batches' means would differ."""

    class Text(Rows):
        def __getitem__(self, i):
            tokens = torch.randint(3, 23, (6,), generator=torch.Generator().manual_seed(i))
            return {"input_ids": tokens, "labels": tokens.where(torch.arange(6) < 2 + i % 4, -100)}

    runs = []
    for size in (16, 4):
        record = []
        model = wrap(BY_NAME["llama"])
        args = arguments(tmp_path, batch=size, gradient_accumulation_steps=16 // size)
        optimizers = (Probe([theta_d(model)], record=record), None)
        run = SubspaceTrainer(model=model, args=args, train_dataset=Text(), optimizers=optimizers)
        run.train()
        runs.append((record, logged(run)))
    (whole, losses), (parts, _) = runs
    for one, other in zip(whole, parts, strict=True):
        for (loss, gradient), (loss_, gradient_) in zip(one, other, strict=True):
            assert loss == pytest.approx(loss_, rel=1e-5)
            torch.testing.assert_close(gradient, gradient_, rtol=1e-3, atol=1e-5)
    assert losses == pytest.approx([step[0][0] for step in whole], rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trials_change_neither_dropout_nor_statistics(accumulation, tmp_path):
    """An update sees one function, and leaves random numbers and statistics as one evaluation would."""
    runs = []
    for trials in (0, 3):
        args = arguments(tmp_path, batch=4, gradient_accumulation_steps=accumulation)
        model = net(dropout=0.5, norm=True)
        probe = Probe([theta_d(model)], trials=trials)
        run = trainer(model, args, optimizers=(probe, None))
        run.train()
        runs.append((probe.record, logged(run), {name: b.clone() for name, b in model.named_buffers()}))
    (plain, losses, buffers), (searched, losses_, buffers_) = runs
    for update in searched:
        for loss, gradient in update[1:]:
            assert loss == update[0][0]
            torch.testing.assert_close(gradient, update[0][1], rtol=0, atol=0)
    assert [update[0][0] for update in plain] == [update[0][0] for update in searched]
    assert losses == losses_ == pytest.approx([update[0][0] for update in plain], rel=1e-3)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, buffers_[name]), name
    assert any("num_batches_tracked" in name and (b == 3 * accumulation).all() for name, b in buffers.items())


def test_nothing_is_evaluated_twice(tmp_path):
    model = net()
    trainer(model, arguments(tmp_path), lambda params: Probe(params, trials=2)).train()
    # Trainer's evaluation, two trials, then the same point without and with gradients
    assert calls(model) == 3 * [True, False, False, False, True]


def test_an_evaluation_is_not_used_once_the_weights_moved(tmp_path):
    class Move(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                theta_d(model).add_(0.5)

    record = []
    run = trainer(net(), arguments(tmp_path, steps=1), lambda params: Probe(params, record=record), callbacks=[Move()])
    run.train()
    (update,) = record
    assert update[0][0] == update[1][0] != pytest.approx(logged(run)[0], rel=1e-3)
    assert torch.equal(update[0][1], update[2][1])


class Descent(torch.optim.Optimizer):
    """Clears the gradients itself, then evaluates."""

    needs_closure = True

    def __init__(self, params, set_to_none):
        super().__init__(params, {"lr": 0.1})
        self.set_to_none = set_to_none

    def step(self, closure):
        self.zero_grad(self.set_to_none)
        loss = closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.1)
        return loss


def test_gradients_that_the_optimiser_clears_in_place_are_computed_again(tmp_path):
    ends = []
    for set_to_none in (True, False):
        model = net()
        trainer(model, arguments(tmp_path), lambda params, how=set_to_none: Descent(params, how)).train()
        ends.append(theta_d(model).detach().clone())
    assert ends[0].any()
    assert torch.equal(*ends)


def test_gradients_are_not_clipped(tmp_path):
    record = []
    run = trainer(net(), arguments(tmp_path), lambda params: Probe(params, record=record))
    run.model.get_base_model().last.base_layer.weight.data.mul_(100)
    run.train()
    norms = [update[0][1].norm().item() for update in record]
    assert norms == pytest.approx(logged(run, "grad_norm"), rel=1e-3)
    assert max(norms) > run.args.max_grad_norm == 1.0


@pytest.mark.parametrize("setting", ["label smoothing", "compute_loss_func"])
def test_every_evaluation_has_the_loss_of_trainer(setting, tmp_path):
    """Both settings make Trainer take the labels out of the inputs."""
    record = []
    model, smoothing, kwargs = net(), 0.0, {}
    if setting == "label smoothing":
        smoothing = 0.2
        model.config = SimpleNamespace(problem_type=None)
    else:
        kwargs["compute_loss_func"] = lambda outputs, labels, num_items_in_batch: (
            F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch + 1
        )
    args = arguments(tmp_path, batch=8, gradient_accumulation_steps=2, label_smoothing_factor=smoothing)
    run = trainer(model, args, lambda params: Probe(params, record=record), **kwargs)
    run.train()
    for update in record:
        assert update[0][0] == update[1][0] == update[2][0]
    assert logged(run) == pytest.approx([update[0][0] for update in record], rel=1e-3)


def test_bf16_autocast(tmp_path):
    record = []
    run = trainer(net(), arguments(tmp_path, bf16=True), lambda params: Probe(params, record=record))
    run.train()
    assert theta_d(run.model).dtype == torch.float32
    for update in record:
        assert update[0][0] == update[1][0] == update[2][0]
        assert torch.equal(update[0][1], update[2][1])
    full = trainer(net(), arguments(tmp_path), lambda params: Probe(params))
    full.train()
    assert logged(run) != logged(full)
    assert logged(run) == pytest.approx(logged(full), rel=2e-2)


def test_an_optimiser_that_needs_logits_gets_their_graph(tmp_path):
    model = net(dropout=0.5)
    optimizer = Logits([theta_d(model)])
    run = trainer(model, arguments(tmp_path), optimizers=(optimizer, None))
    run.train()
    assert calls(model) == 3 * [True]
    assert [loss for loss, _, _ in optimizer.record] == pytest.approx(logged(run), rel=1e-3)
    for loss, loss_of_logits, gradient in optimizer.record:
        assert loss == pytest.approx(loss_of_logits, rel=1e-6)
        assert gradient.any()


def test_logits_of_a_model_that_returns_a_tuple(tmp_path):
    """Where Trainer smooths the labels it takes them out, and the model returns no loss."""
    case, records = BY_NAME["bert"], []
    rows = [{"input_ids": row, "labels": at % 2} for at, row in enumerate(case.batch())]
    for smoothing in (0.0, 0.2):
        model = wrap(case)
        model.config.return_dict = False
        optimizer = Logits([theta_d(model)])
        args = arguments(tmp_path, label_smoothing_factor=smoothing)
        SubspaceTrainer(model, args, train_dataset=rows, optimizers=(optimizer, None)).train()
        records.append(optimizer.record)
    for loss, loss_of_logits, _ in records[0]:
        assert loss == pytest.approx(loss_of_logits, rel=1e-6)
    assert records[1][0][1] == records[0][0][1] != records[1][0][0]


# ------------------------------------------------------------------------------------------------------------ refusals


def refuse(tmp_path, message, optimizer=LBFGS, settings=None, **changes):
    run = trainer(net(), arguments(tmp_path, **changes), optimizer_cls_and_kwargs=(optimizer, settings or {}))
    before = run.args.max_grad_norm
    with pytest.raises(ValueError, match=message):
        run.train()
    assert not theta_d(run.model).any()
    assert run.args.max_grad_norm == before
    return run


def test_fp16_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    refuse(tmp_path, "`fp16` must be off with LBFGS: the gradient scaler")


@pytest.mark.parametrize(("attribute", "name"), [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")])
def test_sharding_is_refused(attribute, name, tmp_path):
    run = trainer(net(), arguments(tmp_path), lambda params: LBFGS(params))
    setattr(run, attribute, True)
    with pytest.raises(ValueError, match=f"LBFGS must hold its parameters whole, and {name} shards them"):
        run.create_optimizer()


def test_settings_without_effect_are_refused(tmp_path):
    refuse(tmp_path, "`max_grad_norm` must be 0 with LBFGS, got 0.5", max_grad_norm=0.5)
    refuse(tmp_path, "`weight_decay` must be 0 with LBFGS, got 0.1", weight_decay=0.1)
    accumulated = {"batch": 4, "gradient_accumulation_steps": 4}
    refuse(tmp_path, "`gradient_accumulation_steps` must be 1 with Logits, got 4", Logits, **accumulated)


def test_a_head_beside_theta_d_is_refused_by_pbfgs(tmp_path):
    model = wrap(BY_NAME["bert"], target_modules="all-linear", task_type="SEQ_CLS")
    run = trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=(PBFGS, {}))
    with pytest.raises(ValueError, match="PBFGS must be given theta_d alone"):
        run.train()


def test_checkpoints_without_the_base_are_refused(tmp_path):
    model = net()
    run = trainer(model, arguments(tmp_path, save_strategy="steps"), optimizers=(distributed.pplus_bfgs(model), None))
    with pytest.raises(ValueError, match="`save_strategy` must be 'no' with PPlusBFGS, got 'steps'"):
        run.train()
