"""SubspaceTrainer where the learning rate is left out."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from subspace_peft import SubspaceTrainer, find_rates
from subspace_peft.rates import Rates, is_like_adam
from tests.cases import theta_d, wrap
from tests.distributed_trainer import logged
from tests.test_trainer import BERT, Rows


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
    pytest.mark.filterwarnings("ignore:theta_d is trained at:UserWarning"),
]


def trainer(folder, cls=SubspaceTrainer, batch=16, **changes):
    torch.manual_seed(0)
    model = wrap(BERT, target_modules="all-linear", task_type="SEQ_CLS")
    options = {"max_steps": 6, "lr_scheduler_type": "constant", "save_strategy": "no", **changes}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        seed=0, **options,
    )  # fmt: skip
    return cls(model, arguments, train_dataset=Rows())


def test_it_is_found_on_the_first_batch(tmp_path):
    run = trainer(tmp_path)
    expected = find_rates(run.model, default_collate([Rows()[i] for i in range(16)]), 6)
    run.train()
    assert logged(run, "learning_rate") == pytest.approx([expected.theta_d] * 6, rel=1e-3)
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx(expected, rel=1e-3)


def test_schedules_start_from_it(tmp_path):
    constant, linear = (
        trainer(tmp_path, batch=4),
        trainer(tmp_path, lr_scheduler_type="linear", warmup_steps=2, batch=4),
    )
    for run in (constant, linear):
        run.train()
    (rate,) = set(logged(constant, "learning_rate"))
    assert logged(linear, "learning_rate") == pytest.approx([rate * x for x in (0, 0.5, 1, 0.75, 0.5, 0.25)])


def test_resuming_is_bit_equal_to_going_on(tmp_path):
    whole = trainer(tmp_path, batch=4, save_strategy="steps", save_steps=2, lr_scheduler_type="cosine")
    whole.train()
    resumed = trainer(tmp_path, batch=4, save_strategy="no", lr_scheduler_type="cosine")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(theta_d(resumed.model), theta_d(whole.model))


@pytest.mark.filterwarnings("ignore:No rate is found:UserWarning")
@pytest.mark.parametrize("changes", [{"learning_rate": 1e-3}, {"optim": "sgd"}], ids=["a rate", "another optimiser"])
def test_otherwise_it_is_trainer(changes, tmp_path):
    runs = [trainer(tmp_path, cls, batch=4, **changes) for cls in (SubspaceTrainer, Trainer)]
    for run in runs:
        run.train()
    assert torch.equal(*(theta_d(run.model) for run in runs))


def test_that_no_rate_is_found_is_said(tmp_path):
    with pytest.warns(UserWarning, match="No rate is found for SGD: theta_d trains at Trainer's default of 5e-05"):
        trainer(tmp_path, optim="sgd", batch=4).train()


class Silent(SubspaceTrainer):
    """Its loss gives no outputs."""

    def compute_loss(self, *args, return_outputs=False, **kwargs):
        if return_outputs:
            raise NotImplementedError
        return super().compute_loss(*args, **kwargs)


def test_a_loss_without_outputs_trains_at_the_default(tmp_path):
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "batch": 4}
    run = trainer(tmp_path, Silent, **schedule)
    with pytest.warns(UserWarning, match="No rate is found for Silent, whose loss gives no outputs: .* of 5e-05"):
        run.train()
    plain = trainer(tmp_path, Trainer, **schedule)
    plain.train()
    assert logged(run, "learning_rate") == logged(plain, "learning_rate")
    assert torch.equal(theta_d(run.model), theta_d(plain.model))


@dataclass
class Arguments(TrainingArguments):
    learning_rate: float = 1e-2


def test_a_default_of_ones_own_is_a_rate(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_subspace_trainer_rates.TrainingArguments", Arguments)
    run = trainer(tmp_path, batch=4)
    run.train()
    assert not logged(run, "found_learning_rate")
    assert logged(run, "learning_rate")[0] == 1e-2


class AdamW8bit(torch.optim.Optimizer):
    """As other libraries have them."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0, **settings):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure=None):
        return closure and closure()


@pytest.mark.filterwarnings("error:theta_d is trained at:UserWarning")
@pytest.mark.parametrize("sensitivity", [1.0, 1e6])
def test_other_optimisers_called_adam_and_what_is_logged(sensitivity, tmp_path, monkeypatch):
    """However low a rate is that was found, it is not warned of."""
    found = find_rates(trainer(tmp_path).model, default_collate([Rows()[i] for i in range(16)]), 6)
    expected = Rates(found.theta_d / sensitivity, found.head)
    monkeypatch.setattr("subspace_peft.trainer.find_rates", lambda *args: expected)
    monkeypatch.setattr(SubspaceTrainer, "get_optimizer_cls_and_kwargs", lambda *args: (AdamW8bit, {"lr": 5e-5}))
    run = trainer(tmp_path)
    run.train()
    assert rates_of(run) == [*expected]
    assert logged(run, "found_learning_rate") == [expected.theta_d]
    assert logged(run, "found_head_learning_rate") == [expected.head]


@pytest.mark.filterwarnings("ignore:.*torch.*:DeprecationWarning")
def test_an_optimiser_of_torchao(tmp_path):
    """It holds its rate in a tensor."""
    whole = trainer(tmp_path, batch=4, optim="adamw_torch_8bit", save_strategy="steps", save_steps=2)
    whole.train()
    assert rates_of(whole)[0] == pytest.approx(logged(whole, "found_learning_rate")[0], rel=1e-6)
    resumed = trainer(tmp_path, batch=4, optim="adamw_torch_8bit", lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(theta_d(resumed.model), theta_d(whole.model))


@pytest.mark.parametrize(("name", "is_one"), [("PagedAdamW8bit", 1), ("_AdamBase", 1), ("DAdaptAdam", 0), ("Lion", 0)])
def test_which_optimisers_are_adam(name, is_one):
    assert is_like_adam(type(name, (torch.optim.Optimizer,), {})) is bool(is_one)


def rates_of(run):
    return [group["initial_lr"] for group in run.optimizer.param_groups]


def test_a_checkpoint_without_the_optimizer_has_no_rates(tmp_path):
    whole = trainer(tmp_path, batch=4, save_strategy="steps", save_steps=2, save_only_model=True)
    whole.train()
    resumed = trainer(tmp_path, batch=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert min(rates_of(resumed)) > 10 * TrainingArguments.learning_rate


class Fails(SubspaceTrainer):
    """The evaluation of this number does not succeed."""

    fails_at = 3

    def compute_loss(self, *args, **kwargs):
        self.fails_at -= 1
        if not self.fails_at:
            raise RuntimeError("out of memory")
        return super().compute_loss(*args, **kwargs)


def test_a_search_that_fails_is_made_again(tmp_path):
    run, plain = trainer(tmp_path, Fails, batch=4), trainer(tmp_path, batch=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    run.train()
    plain.train()
    assert rates_of(run) == rates_of(plain)


def test_a_rate_that_is_given_after_a_search_that_failed(tmp_path):
    run = trainer(tmp_path, Fails, batch=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    run.args.learning_rate, run.optimizer, run.lr_scheduler = 1e-3, None, None
    run.train()
    assert set(rates_of(run)) == {1e-3}


def test_the_users_own_loss(tmp_path):
    """The model never sees the labels, without which this one has a loss of its own."""
    run = trainer(tmp_path, batch=4)
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch: (outputs.logits**2).sum() / num_items_in_batch
    run.train()
    assert min(rates_of(run)) > 10 * TrainingArguments.learning_rate


class OnlyLoss(SubspaceTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


def test_a_loss_without_outputs(tmp_path):
    runs = [trainer(tmp_path, cls, batch=4) for cls in (OnlyLoss, SubspaceTrainer)]
    for run in runs:
        run.train()
    assert rates_of(runs[0]) == rates_of(runs[1])


SCHEDULES = [("cosine_with_min_lr", {"min_lr": 1e-3}), ("polynomial", {"lr_end": 1e-3}), ("linear", {})]


@pytest.mark.parametrize(("schedule", "kwargs"), SCHEDULES)
def test_a_schedule_ends_where_it_is_told_also_when_resumed(schedule, kwargs, tmp_path):
    options = {"batch": 4, "lr_scheduler_type": schedule, "lr_scheduler_kwargs": kwargs}
    whole = trainer(tmp_path, save_strategy="steps", save_steps=2, **options)
    whole.train()
    assert whole.optimizer.param_groups[0]["lr"] == pytest.approx(*kwargs.values() or [0], rel=1e-3)
    assert whole.optimizer.param_groups[0]["initial_lr"] > 2e-3
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(theta_d(resumed.model), theta_d(whole.model))
    assert logged(resumed, "learning_rate")[-4:] == logged(whole, "learning_rate")[-4:]


def test_callbacks_that_hold_the_schedule_see_it_move(tmp_path):
    class Watches(TrainerCallback):
        def on_train_begin(self, args, state, control, lr_scheduler=None, **rest):
            self.schedule, self.seen = lr_scheduler, []

        def on_step_end(self, args, state, control, **rest):
            self.seen.append(self.schedule.get_last_lr()[0])

    watch, run = Watches(), trainer(tmp_path, batch=4, lr_scheduler_type="linear")
    run.add_callback(watch)
    run.train()
    assert watch.schedule is run.lr_scheduler
    assert watch.seen == pytest.approx([rates_of(run)[0] * left / 6 for left in (5, 4, 3, 2, 1, 0)])


def test_without_a_theta_d_that_trains_it_is_trainer(tmp_path):
    runs = [trainer(tmp_path, cls, batch=4) for cls in (SubspaceTrainer, Trainer)]
    for run in runs:
        theta_d(run.model).requires_grad_(False)
        run.train()
    heads = ({name: p for name, p in run.model.named_parameters() if p.requires_grad} for run in runs)
    first, second = heads
    assert first
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_biases_of_the_head_do_not_decay(tmp_path):
    run = trainer(tmp_path, batch=4, weight_decay=0.1)
    run.train()
    groups = [(group["weight_decay"], [p.dim() for p in group["params"]]) for group in run.optimizer.param_groups]
    assert groups == [(0.0, [1]), (0.1, [2]), (0.0, [1])]


def test_a_batch_of_one_sample_is_an_error_that_names_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="all of this one are the same; give more samples, or a learning rate"):
        trainer(tmp_path, batch=1).train()
