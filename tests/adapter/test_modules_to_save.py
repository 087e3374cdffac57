"""Modules that are trained whole beside an adapter, where they meet its targets."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from subspace_peft.adapter.walk import unique_coordinates
from tests.cases import BY_NAME, Case, base_outputs, close, outputs, refused, settings, tokens, train, wrap
from tests.models import SMALL, TEXT


pytestmark = [
    pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def tied_llama() -> nn.Module:
    sizes = {**TEXT, **SMALL, "num_key_value_heads": 1, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))


CASES = {"tied_llama": Case("tied_llama", tied_llama, tokens(3, 5, below=23)), **BY_NAME}
EMBEDDING = "model.embed_tokens.weight"


class Head(nn.Module):
    """Two linears, the name of one of which ends in that of the other, as in DistilBERT."""

    def __init__(self):
        super().__init__()
        self.pre_classifier, self.classifier = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.classifier(torch.tanh(self.pre_classifier(x)))


@pytest.mark.parametrize(
    ("name", "targets", "saved"),
    [
        ("tied_llama", ["embed_tokens"], "lm_head"),
        ("tied_llama", ["lm_head"], "embed_tokens"),
        ("tied_llama", "all", "lm_head"),
        ("gpt2", "all", "wte"),
        ("llama", "all", "norm"),
        ("llama", "all", "mlp"),
        ("vit", "all", "classifier"),
    ],
)
def test_they_are_trained_saved_disabled_and_merged_beside_targets(name, targets, saved, tmp_path):
    case = CASES[name]
    model = wrap(case, target_modules=targets, modules_to_save=[saved])
    assert torch.equal(outputs(model, case), base_outputs(case))
    train(model, case)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad and "theta_d" not in key}
    assert trained
    assert all(f"{saved}.modules_to_save.default" in key for key in trained)
    expected = outputs(model, case)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 + len(trained)  # theta_d and its mark
    assert torch.equal(outputs(PeftModel.from_pretrained(case.model(), tmp_path).eval(), case), expected)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), base_outputs(case))
    close(outputs(model.merge_and_unload(), case), expected, atol=1e-5)


def test_a_tied_tensor_keeps_its_name_beside_a_copy_of_its_first_module():
    model = wrap(CASES["tied_llama"], target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model.add_adapter("other", settings(target_modules=["lm_head"], modules_to_save=["embed_tokens"]))
    assert list(unique_coordinates(model, "other")) == [EMBEDDING]


def test_every_module_whose_name_ends_so_is_trained_whole():
    model = get_peft_model(nn.Sequential(Head(), nn.Linear(4, 4)), settings(modules_to_save=["classifier"]))
    assert set(unique_coordinates(model, "default")) == {"1.weight", "1.bias"}


def test_targets_that_are_trained_whole_are_refused():
    head = Head()
    with refused(head, "must not be one of `modules_to_save`.* take `pre_classifier`"):
        get_peft_model(head, settings(target_modules=["pre_classifier"], modules_to_save=["classifier"]))
    model = get_peft_model(head, settings(target_modules=["classifier"]))
    with refused(model, "`classifier` is a target of 'default'; leave it out"):
        model.add_adapter("other", settings(target_modules=["pre_classifier"], modules_to_save=["classifier"]))


@pytest.mark.parametrize("targets", ["all", "all-linear"])
@pytest.mark.parametrize(
    ("task", "architecture", "heads"),
    [
        ("SEQ_CLS", transformers.BertForSequenceClassification, ["classifier", "score"]),
        ("TOKEN_CLS", transformers.BertForTokenClassification, ["classifier", "score"]),
        ("QUESTION_ANS", transformers.BertForQuestionAnswering, ["qa_outputs"]),
    ],
)
def test_the_head_of_a_task_is_trained_whole_beside_theta_d(task, architecture, heads, targets, tmp_path):
    base = architecture(transformers.BertConfig(**TEXT, **SMALL)).eval()
    plain, x = copy.deepcopy(base), tokens(3, 5, below=23)()
    config = settings(target_modules=targets, task_type=task)
    model = get_peft_model(base, config)
    assert model.peft_config["default"].modules_to_save == config.modules_to_save == heads
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {heads[0], "subspace_vectors"}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_()
    model.eval().save_pretrained(tmp_path)
    expected = model(x)[0]
    assert not torch.equal(expected, plain(x)[0])
    assert torch.equal(PeftModel.from_pretrained(plain, tmp_path).eval()(x)[0], expected)
