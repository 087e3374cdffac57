"""transformers' Trainer: it trains, saves, resumes bit for bit and keeps the best model; and push_to_hub."""

import os

import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from subspace_peft import parameter_groups
from tests.cases import BY_NAME, outputs, theta_d, wrap


BERT = BY_NAME["bert"]
# without an accelerator the loader warns that it was told to pin memory
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


class Rows(Dataset):
    """Sixteen sequences whose labels depend on the first token."""

    def __init__(self):
        self.tokens = torch.randint(3, 23, (16, 5), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i, 0] % 3}


def trainer(folder, steps, groups=False, **kwargs):
    torch.manual_seed(0)
    model = wrap(BERT, target_modules="all-linear", task_type="SEQ_CLS")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **kwargs,
    )
    optimizers = (None, None)
    if groups:
        optimizers = (torch.optim.AdamW(parameter_groups(model, lr=1e-2, head_lr=5e-2)), None)
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), optimizers=optimizers)


@pytest.mark.parametrize("groups", [False, True], ids=["plain", "groups"])
def test_resuming_is_bit_equal_to_going_on(groups, tmp_path):
    straight = trainer(tmp_path / "straight", 4, groups)
    start = straight.evaluate()["eval_loss"]
    straight.train()
    assert straight.evaluate()["eval_loss"] < start
    first = trainer(tmp_path / "halves", 2, groups)
    first.train()
    assert not torch.equal(theta_d(first.model), theta_d(straight.model))
    second = trainer(tmp_path / "halves", 4, groups)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    for (name, one), (_, other) in zip(
        straight.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_each_group_has_its_rate(tmp_path):
    run = trainer(tmp_path, 1, groups=True)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    moved = {name: (p - before[name]).abs().max().item() for name, p in run.model.named_parameters() if name in before}
    assert len(moved) == 3
    for name, distance in moved.items():
        assert distance == pytest.approx(1e-2 if "theta_d" in name else 5e-2, rel=0.1)


def test_a_checkpoint_is_an_adapter(tmp_path):
    run = trainer(tmp_path, 2)
    run.train()
    files = os.listdir(tmp_path / "checkpoint-2")
    assert {"adapter_model.safetensors", "adapter_config.json"} < set(files)
    assert "model.safetensors" not in files
    numbers = sum(tensor.numel() for tensor in load_file(tmp_path / "checkpoint-2/adapter_model.safetensors").values())
    assert numbers == 7 + 8 + 3 * 8 + 3  # theta_d, the mark of P, the head
    loaded = PeftModel.from_pretrained(BERT.model(), tmp_path / "checkpoint-2").eval()
    assert torch.equal(outputs(loaded, BERT), outputs(run.model.eval(), BERT))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    run = trainer(
        tmp_path, 4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")  # the worse one, because greater_is_better
    best = load_file(tmp_path / "checkpoint-2/adapter_model.safetensors")
    assert torch.equal(theta_d(run.model), best["base_model.model.subspace_vectors.subspace_peft_theta_d"])


def test_push_to_hub(monkeypatch, tmp_path):
    """A stand-in for the client of the Hub receives the files of the adapter."""
    sent = {}

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                sent[operation.path_in_repo] = file.read()
        commit = {"commit_url": f"https://huggingface.co/{repo_id}/commit/0", "oid": "0"}
        return CommitInfo(**commit, commit_message="", commit_description="")

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", no_card)
    model = wrap(BERT, target_modules="all-linear", task_type="SEQ_CLS")
    model.push_to_hub("somebody/adapter")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(sent)
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(BERT.model(), tmp_path).eval()
    assert torch.equal(outputs(loaded, BERT), outputs(model, BERT))
