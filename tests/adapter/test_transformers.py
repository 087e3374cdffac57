"""transformers: Auto classes, its own adapter methods, generate, gradient checkpointing, conversion to LoRA."""

import os

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cases import BY_NAME, base_outputs, loss, move, outputs, run, settings, theta_d, train, wrap


LLAMA, GPT2, BERT, MLP = (BY_NAME[name] for name in ("llama", "gpt2", "bert", "mlp"))
LOW_RANK = {"coordinates": "low_rank", "rank": 2, "parameters": ["weight"]}


@pytest.fixture
def base_folder(tmp_path):
    LLAMA.model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_on_disk(base_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(model, settings(target_modules="all-linear", task_type="CAUSAL_LM"))
    train(model, LLAMA)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_auto_classes(base_folder, tmp_path):
    model, folder = adapter_on_disk(base_folder, tmp_path)
    assert isinstance(PeftConfig.from_pretrained(folder), type(settings()))
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(outputs(loaded, LLAMA), outputs(model, LLAMA))


def test_from_pretrained_of_an_adapter_folder(base_folder, tmp_path):
    model, folder = adapter_on_disk(base_folder, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(outputs(loaded, LLAMA), outputs(model, LLAMA))


@pytest.mark.parametrize("wrapped", [lambda model: model.get_base_model(), lambda model: model])
def test_tie_weights_after_wrapping_changes_nothing(wrapped):
    model = wrap(GPT2)
    move(model)
    expected, shapes = outputs(model, GPT2), {name: p.shape for name, p in model.named_parameters()}
    wrapped(model).tie_weights()
    assert torch.equal(outputs(model, GPT2), expected)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    wte = model.get_base_model().transformer.wte
    assert model.get_base_model().get_parameter("transformer.wte.weight") is wte.base_layer.weight


@pytest.mark.parametrize("projection", ["basis", "coordinate"])
def test_transformers_leaves_a_given_projection_behind(projection, tmp_path):
    """transformers reads the file without asking the method, which is then a clear error."""
    D = sum(p.numel() for name, p in LLAMA.model().named_parameters() if "q_proj" in name)
    generator = torch.Generator().manual_seed(0)
    given = {"mask": torch.rand(D, generator=generator) < 0.1}
    if projection == "basis":
        given = {"basis": torch.linalg.qr(torch.randn(D, 4, generator=generator))[0]}
    model = wrap(LLAMA, projection=projection, d=None, target_modules=["q_proj"], **given)
    model.save_pretrained(tmp_path)
    plain = LLAMA.model()
    plain.load_adapter(str(tmp_path), "mine")
    with pytest.raises(ValueError, match="basis or mask of adapter 'mine' must come with its file, but was not read"):
        outputs(plain, LLAMA)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_transformers_own_calls(tmp_path):
    model = LLAMA.model()
    model.add_adapter(settings(target_modules="all-linear"), "mine")
    assert torch.equal(outputs(model, LLAMA), base_outputs(LLAMA))
    train(model, LLAMA)
    trained = outputs(model, LLAMA)
    assert not torch.equal(trained, base_outputs(LLAMA))
    model.save_pretrained(tmp_path)
    assert "model.safetensors" not in os.listdir(tmp_path)
    other = LLAMA.model()
    other.load_adapter(str(tmp_path), "yours")
    assert torch.equal(outputs(other.eval(), LLAMA), trained)
    other.disable_adapters()
    assert torch.equal(outputs(other, LLAMA), base_outputs(LLAMA))
    other.enable_adapters()
    assert torch.equal(outputs(other, LLAMA), trained)
    other.add_adapter(settings(target_modules="all-linear", seed=1), "third")
    other.set_adapter("third")
    assert torch.equal(outputs(other.eval(), LLAMA), base_outputs(LLAMA))
    with pytest.warns(UserWarning, match="third was active which is now deleted"):
        other.delete_adapter("third")
    other.set_adapter("yours")
    assert torch.equal(outputs(other, LLAMA), trained)


@pytest.mark.parametrize("is_trainable", [True, False])
def test_transformers_loads_an_adapter_to_train_it_or_not(is_trainable, tmp_path):
    wrap(LLAMA, target_modules="all-linear").save_pretrained(tmp_path)
    model = LLAMA.model()
    model.load_adapter(str(tmp_path), "mine", is_trainable=is_trainable)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains == (["subspace_vectors.subspace_peft_theta_d.mine.vector"] if is_trainable else [])


@pytest.mark.parametrize("case", [MLP, LLAMA], ids=repr)
def test_direct_injection(case):
    model = inject_adapter_in_model(settings(), case.model())
    assert torch.equal(outputs(model, case), base_outputs(case))
    train(model, case)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    twin = inject_adapter_in_model(settings(), case.model())
    result = set_peft_model_state_dict(twin, state)
    assert not result.unexpected_keys
    assert torch.equal(outputs(twin, case), outputs(model, case))


@pytest.mark.parametrize("case", [LLAMA, GPT2], ids=repr)
@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
def test_generate(case):
    model = wrap(case, task_type="CAUSAL_LM", target_modules="all")
    move(model, size=2)
    tokens = case.batch()
    with_cache = model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
    assert with_cache.shape == (3, 10)
    step = tokens
    for _ in range(5):
        step = torch.cat([step, outputs_of(model, step)[:, -1:].argmax(-1)], 1)
    ended = (step[:, 5:] == 2).cumsum(1).bool()
    assert torch.equal(with_cache[:, 5:][~ended], step[:, 5:][~ended])
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=tokens, max_new_tokens=5, do_sample=False), with_cache)


@torch.no_grad()
def outputs_of(model, tokens):
    return run(model, tokens)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    def gradient(checkpointing):
        model = LLAMA.model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model = get_peft_model(model, settings(target_modules="all-linear")).train()
        move(model)
        loss(model, LLAMA.batch()).backward()
        return theta_d(model).grad

    torch.testing.assert_close(gradient(True), gradient(False))
    assert gradient(True).abs().min() > 0


def test_modules_to_save(tmp_path):
    model = wrap(BERT, task_type="SEQ_CLS", target_modules="all-linear")
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    train(model, BERT)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} < keys
    loaded = PeftModel.from_pretrained(BERT.model(), tmp_path).eval()
    assert torch.equal(outputs(loaded, BERT), outputs(model, BERT))
    with model.disable_adapter():
        assert torch.equal(outputs(model, BERT), base_outputs(BERT))
    merged = outputs(model.merge_and_unload(), BERT)
    torch.testing.assert_close(merged, outputs(loaded, BERT), rtol=1e-4, atol=1e-5)


def test_an_auto_class_for_classification(tmp_path):
    BERT.model().save_pretrained(tmp_path / "base")
    model = type(BERT.model()).from_pretrained(tmp_path / "base")
    model = get_peft_model(model, settings(target_modules="all-linear", task_type="SEQ_CLS"))
    train(model, BERT)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert torch.equal(outputs(loaded, BERT), outputs(model, BERT))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("case", [MLP, GPT2], ids=repr)
def test_a_low_rank_adapter_is_a_lora(case, tmp_path):
    targets = "all-linear"
    model = wrap(case, **LOW_RANK, target_modules=targets, projection="dense")
    move(model, size=0.5)
    assert model.supports_lora_conversion()
    save_as_lora(tmp_path, model, rank=2)
    lora = PeftModel.from_pretrained(case.model(), tmp_path).eval()
    assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(outputs(lora, case), outputs(model, case), rtol=1e-4, atol=1e-5)


def test_weight_coordinates_are_a_lora_of_full_rank():
    model = wrap(MLP, parameters=["weight"])
    move(model, size=0.5)
    config, state = convert_to_lora(model, rank=4)
    lora = get_peft_model(MLP.model(), config).eval()
    set_peft_model_state_dict(lora, state)
    expected = outputs(model, MLP)
    fc1 = model.base_model.model.fc1.get_delta_weight("default")
    if torch.linalg.matrix_rank(fc1) <= 4:
        torch.testing.assert_close(outputs(lora, MLP), expected, rtol=1e-4, atol=1e-5)
    fc2 = model.base_model.model.fc2.get_delta_weight("default")
    product = state["base_model.model.fc2.lora_B.weight"] @ state["base_model.model.fc2.lora_A.weight"]
    torch.testing.assert_close(product, fc2, rtol=1e-4, atol=1e-5)


def test_what_lora_cannot_hold_is_not_converted():
    model = wrap(MLP)  # moves biases too
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_compiled_outputs_and_gradients_are_those_of_eager(name):
    case = BY_NAME[name]
    model = wrap(case)
    move(model)
    expected = outputs(model, case)
    loss(model, case.batch()).backward()
    gradient = theta_d(model).grad.clone()
    theta_d(model).grad = None
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, case), expected, rtol=1e-4, atol=1e-5)
    loss(compiled, case.batch()).backward()
    torch.testing.assert_close(theta_d(model).grad, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
