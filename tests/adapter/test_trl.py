"""TRL: trainers that copy a trained adapter by its name as their reference, and rates that are found in them."""

import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from subspace_peft import SubspaceTrainer
from tests.cases import BY_NAME, close, move, outputs, theta_d, wrap
from tests.cases import settings as subspace


LLAMA = BY_NAME["llama"]
SETTINGS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PREFERENCES = [
    {"prompt": "a b c", "chosen": " d e", "rejected": " f g h"},
    {"prompt": "c d", "chosen": " i", "rejected": " j k"},
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
    # TRL 1.16 calls it what transformers 5.23 renames
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of twenty letters, in the vocabulary of the tests' models."""
    words = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrst"]
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=letters, **special)


def trained_adapter(folder) -> PeftModel:
    """An adapter that was trained, saved, and loaded to be trained on."""
    model = wrap(LLAMA, **SETTINGS)
    move(model, size=0.5)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(LLAMA.model(), folder, is_trainable=True)


def settings(folder) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }


def logged(trainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def assert_reference_is(model: PeftModel, start: PeftModel) -> None:
    """Assert that the reference is the adapter at the start, and that training has moved the other away from it."""
    model.eval()
    assert torch.equal(theta_d(model, "ref"), theta_d(start))
    assert not torch.equal(theta_d(model), theta_d(start))
    model.set_adapter("ref")
    assert torch.equal(outputs(model, LLAMA), outputs(start.eval(), LLAMA))


def test_the_first_loss_of_dpo_is_log_2(tmp_path):
    trainer = DPOTrainer(
        trained_adapter(tmp_path / "adapter"),
        args=DPOConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list(PREFERENCES * 3),
        processing_class=tokenizer(),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    close(losses[0], math.log(2), rtol=1e-6)
    assert losses[-1] < losses[0]
    assert_reference_is(trainer.model, trained_adapter(tmp_path / "adapter"))


def test_grpo_measures_its_divergence_from_the_trained_adapter(tmp_path):
    trainer = GRPOTrainer(
        trained_adapter(tmp_path / "adapter"),
        reward_funcs=lambda completions, **_: [float(text.count("e") + len(text) / 10) for text in completions],
        args=GRPOConfig(**settings(tmp_path), beta=0.1, num_generations=2, max_completion_length=4),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES * 3]),
        processing_class=tokenizer(),
    )
    trainer.train()
    divergences = logged(trainer, "kl")
    assert divergences[0] == 0
    assert divergences[-1] > 0
    assert_reference_is(trainer.model, trained_adapter(tmp_path / "adapter"))


def tuned(folder, kind, config, cls=SubspaceTrainer, **options):
    """After training at the default rate of the arguments, or at the one that is found."""
    arguments = {name: value for name, value in settings(folder).items() if name != "learning_rate"}
    made = type(kind.__name__, (kind,) if cls is None else (cls, kind), {})
    trainer = made(
        LLAMA.model(), args=config(**arguments, **options.pop("args", {})), processing_class=tokenizer(),
        peft_config=subspace(**SETTINGS), **options,
    )  # fmt: skip
    trainer.train()
    return trainer


JUDGED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i == 0} for i, row in enumerate(PREFERENCES)]
TEXTS = Dataset.from_list([{"text": "a b c d e f"}, {"text": "g h a b"}] * 3)


@pytest.mark.parametrize(
    ("kind", "config", "data"),
    [
        (SFTTrainer, SFTConfig, TEXTS),
        (DPOTrainer, DPOConfig, Dataset.from_list(PREFERENCES * 3)),
        (KTOTrainer, KTOConfig, Dataset.from_list(JUDGED * 3)),
    ],
    ids=["sft", "dpo", "kto"],
)
def test_a_rate_is_found_where_it_is_left_at_the_default_of_the_arguments(kind, config, data, tmp_path):
    trainer = tuned(tmp_path, kind, config, train_dataset=data)
    (rate,) = logged(trainer, "found_learning_rate")
    assert rate == logged(trainer, "learning_rate")[0] > 1000 * config.learning_rate


@pytest.mark.parametrize("name", [name for name in dir(trl) if name.endswith("Trainer")])
def test_nothing_of_ours_hides_what_a_trainer_of_trl_has_of_its_own(name):
    ours = {each for each in vars(SubspaceTrainer) if not hasattr(Trainer, each)}
    assert not ours & set(dir(getattr(trl, name)))


def test_plain_training_arguments_are_no_rate_either(tmp_path):
    arguments = {name: value for name, value in settings(tmp_path).items() if name != "learning_rate"}
    trainer = type("Tuner", (SubspaceTrainer, SFTTrainer), {})(
        LLAMA.model(), args=TrainingArguments(**arguments), processing_class=tokenizer(),
        peft_config=subspace(**SETTINGS), train_dataset=TEXTS,
    )  # fmt: skip
    trainer.train()
    assert len(logged(trainer, "found_learning_rate")) == 1


def test_where_batches_are_generated_no_rate_is_found_and_none_more_is_generated(tmp_path):
    calls = []

    def reward(completions, **_):
        calls.append(len(completions))
        return [float(text.count("e") + len(text) / 10) + len(calls) for text in completions]

    def run(cls):
        calls.clear()
        data = Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES * 3])
        args = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "weight_decay": 0.1}
        trainer = tuned(tmp_path, GRPOTrainer, GRPOConfig, cls, reward_funcs=reward, train_dataset=data, args=args)
        lines = ("kl", "learning_rate", "num_tokens", "loss")
        return theta_d(trainer.model), [logged(trainer, line) for line in lines], len(calls)

    match = "No rate is found for GRPOTrainer, which generates what it trains on: .* Trainer's default of 1e-06"
    with pytest.warns(UserWarning, match=match):
        vector, lines, count = run(SubspaceTrainer)
    plain, expected, plain_count = run(None)
    assert torch.equal(vector, plain)
    assert (lines, count) == (expected, plain_count)
