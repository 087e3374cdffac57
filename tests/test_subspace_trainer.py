"""SubspaceTrainer: optimisers that evaluate the loss themselves, in transformers' Trainer and in an accelerate loop.

test_trainer.py is about the plain Trainer.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.optim import LBFGS
from transformers import Trainer, TrainerCallback, default_data_collator

from subspace_peft import SubspaceTrainer
from subspace_peft.optim import PBFGS
from tests import distributed_trainer as distributed
from tests.cases import BY_NAME, theta_d, wrap
from tests.distributed_trainer import WOLFE, Rows, arguments, net


ROOT = Path(__file__).parent.parent
# accelerate tells the loader to pin memory where there is no accelerator
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


class Probe(torch.optim.Optimizer):
    """Evaluates as a line search does, records what it got, then makes a step down the gradient."""

    needs_closure = True

    def __init__(self, params, lr=0.1, trials=3, record=None):
        super().__init__(params, {"lr": lr})
        self.trials, self.record = trials, record if record is not None else []

    @torch.no_grad()
    def step(self, closure):
        (theta_d,) = self.param_groups[0]["params"]
        theta_d.grad = None
        with torch.enable_grad():
            seen = [(closure().item(), theta_d.grad.clone())]
        start = theta_d.clone()
        for _ in range(self.trials):
            theta_d.add_(1.0)
            closure()
            theta_d.copy_(start)
        if self.trials:
            seen.append((closure().item(), seen[0][1]))
            with torch.enable_grad():
                seen.append((closure().item(), theta_d.grad.clone()))
        self.record.append(seen)
        theta_d.sub_(seen[0][1], alpha=self.param_groups[0]["lr"])


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


def trainer(model, args, optimizer: Callable | None = None, cls=SubspaceTrainer, **kwargs) -> Trainer:
    """With `optimizer`, a function of the trained vector, through `optimizers=`."""
    if optimizer is not None:
        kwargs["optimizers"] = (optimizer([theta_d(model)]), None)
    return cls(model=model, args=args, train_dataset=Rows(), **kwargs)


def logged(run: Trainer, key: str = "loss") -> list[float]:
    return [float(entry[key]) for entry in run.state.log_history if key in entry]


def calls(model) -> list[bool]:
    return model.get_base_model().calls


def plain_loop(model, optimizer, batches: list[dict]) -> list[float]:
    losses = []
    for batch in batches:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            if torch.is_grad_enabled():
                loss.backward()
            return loss.detach()

        losses.append(optimizer.step(closure).item())
    return losses


@pytest.mark.parametrize("accumulation", [1, 2])
def test_other_optimisers_train_as_in_trainer(accumulation, tmp_path):
    found = []
    for cls in (Trainer, SubspaceTrainer):
        args = arguments(
            tmp_path, batch=4, gradient_accumulation_steps=accumulation, learning_rate=0.1, lr_scheduler_type="linear",
            max_grad_norm=0.01,
        )  # fmt: skip
        run = trainer(net(dropout=0.5), args, cls=cls)
        run.train()
        found.append(
            (theta_d(run.model).detach(), logged(run), logged(run, "grad_norm"), logged(run, "learning_rate"))
        )
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert found[0][0].any()


OPTIMIZERS = {"pbfgs": (PBFGS, {}), "next_batch": (PBFGS, {"curvature": "next_batch"}), "lbfgs": (LBFGS, WOLFE)}


@pytest.mark.parametrize("by_class", [False, True], ids=["optimizers", "class"])
@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_closures_are_those_of_a_plain_loop(optimizer, options, by_class, tmp_path):
    """Bit for bit, and with no evaluation more."""
    batches = []

    def collate(rows):
        batches.append(default_data_collator(rows))
        return dict(batches[-1])

    model = net()
    route = {"optimizer_cls_and_kwargs": (optimizer, options)} if by_class else {}
    if not by_class:
        route["optimizers"] = (optimizer([theta_d(model)], **options), None)
    run = trainer(model, arguments(tmp_path, batch=8), data_collator=collate, **route)
    run.train()
    alone = net()
    losses = plain_loop(alone, optimizer([theta_d(alone)], **options), batches[:3])
    assert torch.equal(theta_d(model), theta_d(alone))
    assert theta_d(model).any()
    assert logged(run) == pytest.approx(losses, rel=1e-3)
    assert calls(model) == calls(alone)


@pytest.mark.parametrize("batch", [4, 2])
def test_accumulated_micro_batches_are_one_batch(batch, tmp_path):
    found = []
    for size in (16, batch):
        run = trainer(
            net(), arguments(tmp_path, batch=size, gradient_accumulation_steps=16 // size),
            lambda params: LBFGS(params, lr=0.1, max_iter=3),  # a line search would turn rounding into another step
        )  # fmt: skip
        run.train()
        found.append(theta_d(run.model).detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert found[0].any()


def test_losses_per_token_are_accumulated_as_in_trainer(tmp_path):
    """A causal model is told how many tokens the update has: labels are ragged, the mean of means is another."""

    class Text(Rows):
        def __getitem__(self, i):
            tokens = torch.randint(3, 23, (6,), generator=torch.Generator().manual_seed(i))
            return {"input_ids": tokens, "labels": tokens.where(torch.arange(6) < 2 + i % 4, -100)}

    found = []
    for size in (16, 4):
        record = []
        model = wrap(BY_NAME["llama"])
        args = arguments(tmp_path, batch=size, gradient_accumulation_steps=16 // size)
        optimizers = (Probe([theta_d(model)], record=record), None)
        run = SubspaceTrainer(model=model, args=args, train_dataset=Text(), optimizers=optimizers)
        run.train()
        found.append((record, logged(run)))
    (whole, losses), (parts, _) = found
    for one, other in zip(whole, parts, strict=True):
        for (loss, gradient), (loss_, gradient_) in zip(one, other, strict=True):
            assert loss == pytest.approx(loss_, rel=1e-5)
            torch.testing.assert_close(gradient, gradient_, rtol=1e-3, atol=1e-5)
    assert losses == pytest.approx([step[0][0] for step in whole], rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trials_change_neither_dropout_nor_statistics(accumulation, tmp_path):
    """One update sees one function, and what is left behind is what one evaluation leaves."""
    found = []
    for trials in (0, 3):
        args = arguments(tmp_path, batch=4, gradient_accumulation_steps=accumulation)
        model = net(dropout=0.5, norm=True)
        probe = Probe([theta_d(model)], trials=trials)
        run = trainer(model, args, optimizers=(probe, None))
        run.train()
        found.append((probe.record, logged(run), {name: b.clone() for name, b in model.named_buffers()}))
    (plain, losses, buffers), (searched, losses_, buffers_) = found
    for seen in searched:
        for loss, gradient in seen[1:]:
            assert loss == seen[0][0]
            torch.testing.assert_close(gradient, seen[0][1], rtol=0, atol=0)
    assert [seen[0][0] for seen in plain] == [seen[0][0] for seen in searched]
    assert losses == losses_ == pytest.approx([seen[0][0] for seen in plain], rel=1e-3)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, buffers_[name]), name
    assert any("num_batches_tracked" in name and (b == 3 * accumulation).all() for name, b in buffers.items())


def test_nothing_is_evaluated_twice(tmp_path):
    model = net()
    trainer(model, arguments(tmp_path), lambda params: Probe(params, trials=2)).train()
    # trainer's own, two trials, the same point without and with gradients
    assert calls(model) == 3 * [True, False, False, False, True]


def test_an_evaluation_is_not_used_once_the_weights_moved(tmp_path):
    class Move(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                theta_d(model).add_(0.5)

    record = []
    run = trainer(net(), arguments(tmp_path, steps=1), lambda params: Probe(params, record=record), callbacks=[Move()])
    run.train()
    (seen,) = record
    assert seen[0][0] == seen[1][0] != pytest.approx(logged(run)[0], rel=1e-3)
    assert torch.equal(seen[0][1], seen[2][1])


def test_gradients_are_not_clipped(tmp_path):
    record = []
    run = trainer(net(), arguments(tmp_path), lambda params: Probe(params, record=record))
    run.model.get_base_model().last.weight.data.mul_(100)
    run.train()
    norms = [seen[0][1].norm().item() for seen in record]
    assert norms == pytest.approx(logged(run, "grad_norm"), rel=1e-3)
    assert max(norms) > run.args.max_grad_norm == 1.0


@pytest.mark.parametrize("changed", ["label smoothing", "compute_loss_func"])
def test_every_evaluation_has_the_loss_of_trainer(changed, tmp_path):
    """Both take the labels out of the inputs."""
    record = []
    model, smoothing, kwargs = net(), 0.0, {}
    if changed == "label smoothing":
        smoothing = 0.2
        model.config = SimpleNamespace(problem_type=None)
    else:
        kwargs["compute_loss_func"] = lambda outputs, labels, num_items_in_batch: (
            F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch + 1
        )
    args = arguments(tmp_path, batch=8, gradient_accumulation_steps=2, label_smoothing_factor=smoothing)
    run = trainer(model, args, lambda params: Probe(params, record=record), **kwargs)
    run.train()
    for seen in record:
        assert seen[0][0] == seen[1][0] == seen[2][0]
    assert logged(run) == pytest.approx([seen[0][0] for seen in record], rel=1e-3)


def test_callbacks_and_modes_are_those_of_trainer(tmp_path):
    class Events(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_begin(self, args, state, control, model, **kwargs):
            self.seen.append("begin")

        def on_substep_end(self, args, state, control, model, **kwargs):
            self.seen.append(("substep", theta_d(model).detach().clone()))

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            assert theta_d(model).grad is not None
            self.seen.append(("before", theta_d(model).detach().clone()))

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            assert model.training
            self.seen.append(("after", theta_d(model).detach().clone()))

    events = Events()
    args = arguments(tmp_path, steps=2, batch=8, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    run = trainer(net(), args, lambda params: LBFGS(params, **WOLFE), callbacks=[events], eval_dataset=Rows())
    run.train()
    assert [e if e == "begin" else e[0] for e in events.seen] == 2 * ["begin", "substep", "before", "after"]
    for substep, before, after in (events.seen[1:4], events.seen[5:8]):
        assert torch.equal(substep[1], before[1])
        assert not torch.equal(before[1], after[1])
    assert len(logged(run, "eval_loss")) == 2


def test_schedules_act_on_the_rate(tmp_path):
    args = arguments(tmp_path, steps=4, lr_scheduler_type="linear")
    run = trainer(net(), args, lambda params: PBFGS(params, lr=0.5))
    run.train()
    assert logged(run, "learning_rate") == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert logged(run)[-1] < logged(run)[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resuming_is_bit_equal_to_going_on(optimizer, tmp_path):
    def run(folder, steps):
        saved = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
        args = arguments(tmp_path / folder, steps, batch=2, **saved)
        return trainer(net(dropout=0.3, norm=True), args, optimizer_cls_and_kwargs=optimizer)

    straight = run("straight", 6)
    straight.train()
    run("halves", 3).train()
    resumed = run("halves", 6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert logged(resumed) == logged(straight)
    assert len(set(logged(straight))) == 6
    for (name, one), (_, other) in zip(
        straight.model.state_dict().items(), resumed.model.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name


def test_bf16_autocast(tmp_path):
    record = []
    run = trainer(net(), arguments(tmp_path, bf16=True), lambda params: Probe(params, record=record))
    run.train()
    assert theta_d(run.model).dtype == torch.float32
    for seen in record:
        assert seen[0][0] == seen[1][0] == seen[2][0]
        assert torch.equal(seen[0][1], seen[2][1])
    full = trainer(net(), arguments(tmp_path), lambda params: Probe(params))
    full.train()
    assert logged(run) != logged(full)
    assert logged(run) == pytest.approx(logged(full), rel=2e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_bf16_lowers_the_loss(optimizer, tmp_path):
    found = []
    for bf16 in (False, True):
        run = trainer(net(), arguments(tmp_path, steps=10, bf16=bf16), optimizer_cls_and_kwargs=optimizer)
        run.train()
        found.append(logged(run))
    full, half = found
    assert half != full
    assert half[0] == pytest.approx(full[0], rel=2e-2)
    assert max(half[-1], full[-1]) < 0.75 * full[0]


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


def test_what_would_not_act_is_refused(tmp_path):
    refuse(tmp_path, "`max_grad_norm` must be 0 with LBFGS, got 0.5", max_grad_norm=0.5)
    refuse(tmp_path, "`weight_decay` must be 0 with LBFGS, got 0.1", weight_decay=0.1)
    accumulated = {"batch": 4, "gradient_accumulation_steps": 4}
    refuse(tmp_path, "`gradient_accumulation_steps` must be 1 with Logits, got 4", Logits, **accumulated)


def test_a_head_beside_theta_d_is_refused_by_pbfgs(tmp_path):
    model = wrap(BY_NAME["bert"], target_modules="all-linear", task_type="SEQ_CLS")
    run = trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=(PBFGS, {}))
    with pytest.raises(ValueError, match="PBFGS must be given theta_d alone"):
        run.train()


def test_pplus_bfgs_moves_the_base_too(tmp_path):
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(model, arguments(tmp_path, steps=4), optimizers=(distributed.pplus_bfgs(model), None))
    run.train()
    assert logged(run)[-1] < 0.8 * logged(run)[0]
    assert len(before) == 5  # theta_d and the base
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_checkpoints_without_the_base_are_refused(tmp_path):
    model = net()
    run = trainer(model, arguments(tmp_path, save_strategy="steps"), optimizers=(distributed.pplus_bfgs(model), None))
    with pytest.raises(ValueError, match="`save_strategy` must be 'no' with PPlusBFGS, got 'steps'"):
        run.train()


def test_training_twice_goes_on(tmp_path):
    """The hook and the clipping are put back after each call of train."""
    run = trainer(net(), arguments(tmp_path), optimizer_cls_and_kwargs=(PBFGS, {}))
    run.train()
    first = logged(run)
    inner = run.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks
    run.train()
    assert run.args.max_grad_norm == 1.0
    assert logged(run)[0] < first[0]
    assert len(calls(run.model)) > 6


def test_an_optimiser_of_the_logits_has_their_graph(tmp_path):
    model = net(dropout=0.5)
    optimizer = Logits([theta_d(model)])
    run = trainer(model, arguments(tmp_path), optimizers=(optimizer, None))
    run.train()
    assert calls(model) == 3 * [True]
    assert [loss for loss, _, _ in optimizer.record] == pytest.approx(logged(run), rel=1e-3)
    for loss, again, gradient in optimizer.record:
        assert loss == pytest.approx(again, rel=1e-6)
        assert gradient.any()


@pytest.fixture(scope="module")
def together() -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.distributed_trainer"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if "FOUND " in line)
    return json.loads(line.split("FOUND ")[1])


@pytest.mark.parametrize("kind", [*distributed.OPTIMIZERS, "loop"])
def test_two_processes_are_one(kind, together):
    one, other = (found[kind] for found in together)
    assert one.pop("losses", 0) == other.pop("losses", 0)
    assert one == other, "the line searches of the processes parted"
    alone = distributed.by_accelerate() if kind == "loop" else distributed.by_trainer(kind)
    assert one["calls"] == alone["calls"]
    assert one["theta_d"] == pytest.approx(alone["theta_d"], rel=1e-3, abs=1e-4)
    assert max(map(abs, one["theta_d"])) > 1e-2


def test_a_loop_of_ones_own_is_the_trainer(together):
    loop, run = together[0]["loop"], together[0]["pbfgs"]
    assert loop["theta_d"] == pytest.approx(run["theta_d"], rel=1e-3, abs=1e-4)
    assert loop["calls"] == run["calls"]
