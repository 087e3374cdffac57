"""SubspaceTrainer: optimisers that evaluate the loss themselves, in transformers' Trainer and in an accelerate loop.

test_trainer.py tests the plain Trainer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import LBFGS
from transformers import Trainer, TrainerCallback, default_data_collator

from subspace_peft import SubspaceTrainer
from subspace_peft.optim import PBFGS
from tests import distributed_trainer as distributed
from tests.cases import theta_d
from tests.distributed_trainer import WOLFE, Rows, arguments, calls, logged, net, trainer


ROOT = Path(__file__).parent.parent
# without an accelerator the loader warns that it was told to pin memory
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


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
    runs = []
    for cls in (Trainer, SubspaceTrainer):
        args = arguments(
            tmp_path, batch=4, gradient_accumulation_steps=accumulation, learning_rate=0.1, lr_scheduler_type="linear",
            max_grad_norm=0.01,
        )  # fmt: skip
        run = trainer(net(dropout=0.5), args, cls=cls)
        run.train()
        runs.append((theta_d(run.model).detach(), logged(run), logged(run, "grad_norm"), logged(run, "learning_rate")))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
    assert runs[0][0].any()


OPTIMIZERS = {"pbfgs": (PBFGS, {}), "next_batch": (PBFGS, {"curvature": "next_batch"}), "lbfgs": (LBFGS, WOLFE)}


@pytest.mark.parametrize("by_class", [False, True], ids=["optimizers", "class"])
@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_plain_loop_gives_the_same(optimizer, options, by_class, tmp_path):
    """Bit for bit, with the same evaluations."""
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
    ends = []
    for size in (16, batch):
        run = trainer(
            net(), arguments(tmp_path, batch=size, gradient_accumulation_steps=16 // size),
            lambda params: LBFGS(params, lr=0.1, max_iter=3),  # a line search would amplify rounding
        )  # fmt: skip
        run.train()
        ends.append(theta_d(run.model).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)
    assert ends[0].any()


def test_callbacks_and_modes_are_those_of_trainer(tmp_path):
    class Events(TrainerCallback):
        def __init__(self):
            self.events = []

        def on_step_begin(self, args, state, control, model, **kwargs):
            self.events.append("begin")

        def on_substep_end(self, args, state, control, model, **kwargs):
            self.events.append(("substep", theta_d(model).detach().clone()))

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            assert theta_d(model).grad is not None
            self.events.append(("before", theta_d(model).detach().clone()))

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            assert model.training
            self.events.append(("after", theta_d(model).detach().clone()))

    callback = Events()
    args = arguments(tmp_path, steps=2, batch=8, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    run = trainer(net(), args, lambda params: LBFGS(params, **WOLFE), callbacks=[callback], eval_dataset=Rows())
    run.train()
    assert [event if event == "begin" else event[0] for event in callback.events] == 2 * [
        "begin",
        "substep",
        "before",
        "after",
    ]
    for substep, before, after in (callback.events[1:4], callback.events[5:8]):
        assert torch.equal(substep[1], before[1])
        assert not torch.equal(before[1], after[1])
    assert len(logged(run, "eval_loss")) == 2


def test_a_schedule_changes_the_rate(tmp_path):
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_bf16_lowers_the_loss(optimizer, tmp_path):
    losses = []
    for bf16 in (False, True):
        run = trainer(net(), arguments(tmp_path, steps=10, bf16=bf16), optimizer_cls_and_kwargs=optimizer)
        run.train()
        losses.append(logged(run))
    full, half = losses
    assert half != full
    assert half[0] == pytest.approx(full[0], rel=2e-2)
    assert max(half[-1], full[-1]) < 0.75 * full[0]


def test_pplus_bfgs_moves_the_base_too(tmp_path):
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(model, arguments(tmp_path, steps=4), optimizers=(distributed.pplus_bfgs(model), None))
    run.train()
    assert logged(run)[-1] < 0.8 * logged(run)[0]
    assert len(before) == 5  # theta_d and the base
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_training_twice_goes_on(tmp_path):
    """Each call of train removes its hook and restores the clipping."""
    run = trainer(net(), arguments(tmp_path), optimizer_cls_and_kwargs=(PBFGS, {}))
    run.train()
    first = logged(run)
    inner = run.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks
    run.train()
    assert run.args.max_grad_norm == 1.0
    assert logged(run)[0] < first[0]
    assert len(calls(run.model)) > 6


# ---------------------------------------------------------------------------------------------------- on two processes


@pytest.fixture(scope="module")
def together() -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.distributed_trainer"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if "RESULTS " in line)
    return json.loads(line.split("RESULTS ")[1])


@pytest.mark.parametrize("kind", [*distributed.OPTIMIZERS, "loop"])
def test_two_processes_train_as_one(kind, together):
    one, other = (results[kind] for results in together)
    assert one.pop("losses", 0) == other.pop("losses", 0)
    assert one == other, "the line searches of the processes differ"
    alone = distributed.by_accelerate() if kind == "loop" else distributed.by_trainer(kind)
    assert one["calls"] == alone["calls"]
    assert one["theta_d"] == pytest.approx(alone["theta_d"], rel=1e-3, abs=1e-4)
    assert max(map(abs, one["theta_d"])) > 1e-2


def test_a_loop_with_accelerate_trains_as_the_trainer(together):
    loop, run = together[0]["loop"], together[0]["pbfgs"]
    assert loop["theta_d"] == pytest.approx(run["theta_d"], rel=1e-3, abs=1e-4)
    assert loop["calls"] == run["calls"]
