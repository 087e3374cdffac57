"""Quantised models of transformers: loaded, trained, evaluated, saved and merged as users do."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.quantised import is_quantised
from tests.adapter.quantised import torchao
from tests.cases import move, theta_d


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = ["lm_head", "classifier"]
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": HEADS}
QUANTISATIONS = {
    "4-bit": lambda: BitsAndBytesConfig(**FOUR_BITS, bnb_4bit_compute_dtype=torch.float32),
    "4-bit, as for FSDP": lambda: BitsAndBytesConfig(
        **FOUR_BITS,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16,
    ),
    "8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS),
    "int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=HEADS),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",  # peft's prepare_model_for_kbit_training
    "ignore:'pin_memory' argument is set as true:UserWarning",
)


def saved(tmp_path_factory, kind: type) -> str:
    """The folder of a tiny model of this class."""
    folder = str(tmp_path_factory.mktemp(kind.__name__))
    torch.manual_seed(0)
    kind(kind.config_class(**SIZES, vocab_size=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """The folder of a tiny language model."""
    return saved(tmp_path_factory, LlamaForCausalLM)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """The folder of a tiny encoder."""
    return saved(tmp_path_factory, BertForSequenceClassification)


def load(folder: str, kind: str, model: type = AutoModelForCausalLM, dtype: torch.dtype = torch.float32):
    return model.from_pretrained(folder, quantization_config=QUANTISATIONS[kind](), device_map="cpu", dtype=dtype)


def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))


def settings(**changes) -> SubspaceConfig:
    return SubspaceConfig(**{"d": 200, "projection": "fastjl", "target_modules": "all-linear", **changes})


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_theta_d_of_an_encoder_learns_and_is_saved_during_training(kind, bert, tmp_path):
    """The loss falls by steps of theta_d alone, also after an evaluation and a saved checkpoint."""
    model = load(bert, kind, AutoModelForSequenceClassification)
    model = get_peft_model(model, settings())
    assert model.get_model_status().quantization_backend is not None
    data = [{"input_ids": tokens()[i % 2].roll(i // 2), "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=12,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    optimizer = torch.optim.Adam([theta_d(model)], lr=0.02)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, optimizers=(optimizer, None))
    before = theta_d(model).clone()
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < 0.9 * losses[0], losses
    assert (theta_d(model) != before).all()
    with torch.no_grad():
        expected = model.eval()(tokens()).logits
    again = PeftModel.from_pretrained(
        load(bert, kind, AutoModelForSequenceClassification), tmp_path / "out" / "checkpoint-12"
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens()).logits, expected)


@pytest.mark.parametrize("kind", QUANTISATIONS)
@torch.no_grad()
def test_a_merged_model_is_saved_and_loaded_as_a_plain_one(kind, llama, tmp_path):
    model = get_peft_model(load(llama, kind), settings()).eval()
    move(model)
    expected = model(tokens()).logits
    merged = model.merge_and_unload()
    assert not any(map(is_quantised, merged.parameters()))
    torch.testing.assert_close(merged(tokens()).logits, expected, rtol=0.02, atol=0.02)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, merged(tokens()).logits)


@torch.no_grad()
def test_a_model_merged_in_part_is_saved_once_the_rest_is_dequantised(llama, tmp_path):
    model = get_peft_model(load(llama, "4-bit"), settings(target_modules=["q_proj", "v_proj"])).eval()
    move(model)
    expected = model(tokens()).logits
    merged = model.merge_and_unload()
    assert any(map(is_quantised, merged.parameters()))
    merged.dequantize().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_a_prepared_base_trains_with_checkpointed_activations_and_generates(kind, llama):
    """What QLoRA's users call first casts what is not quantised to float32; theta_d has the same gradient with it."""
    gradients = []
    for is_checkpointed in (False, True):
        base = prepare_model_for_kbit_training(load(llama, kind), is_checkpointed, {"use_reentrant": False})
        model = get_peft_model(base, settings()).train()
        move(model)
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append(theta_d(model).grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    assert gradients[0].dtype == torch.float32
    assert model.eval().generate(tokens(), max_new_tokens=3, do_sample=False).shape == (2, 11)


@pytest.mark.parametrize("kind", ["8-bit", "int8"])
def test_in_bfloat16_an_increment_of_single_layers_is_not_rounded_away(kind, llama):
    model = get_peft_model(load(llama, kind, dtype=torch.bfloat16), settings()).eval()
    with torch.no_grad():
        start = model(tokens()).logits
        move(model, size=1e-3)
        assert not torch.equal(model(tokens()).logits, start)
    assert start.dtype == torch.bfloat16
    assert theta_d(model).dtype == torch.float32


@pytest.mark.parametrize("kind", QUANTISATIONS)
@torch.no_grad()
def test_a_model_with_merged_norms_and_biases_is_saved_as_a_quantised_one(kind, bert, tmp_path):
    model = load(bert, kind, AutoModelForSequenceClassification)
    names = [name for name, parameter in model.named_parameters() if is_quantised(parameter)]
    model = get_peft_model(model, settings(target_modules="all", parameters="vectors")).eval()
    move(model)
    expected = model(tokens()).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map="cpu").eval()
    assert [name for name, parameter in again.named_parameters() if is_quantised(parameter)] == names != []
    torch.testing.assert_close(again(tokens()).logits, expected, rtol=0.02, atol=0.02)
