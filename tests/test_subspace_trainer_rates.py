"""SubspaceTrainer where the learning rate is left out."""

import pytest
import torch
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from subspace_peft import SubspaceTrainer, find_rates
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


@pytest.mark.parametrize("changes", [{"learning_rate": 1e-3}, {"optim": "sgd"}], ids=["a rate", "another optimiser"])
def test_otherwise_it_is_trainer(changes, tmp_path):
    runs = [trainer(tmp_path, cls, batch=4, **changes) for cls in (SubspaceTrainer, Trainer)]
    for run in runs:
        run.train()
    assert torch.equal(*(theta_d(run.model) for run in runs))
