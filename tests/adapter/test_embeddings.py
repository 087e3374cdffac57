"""Embeddings in the adapter's file: those of a resized vocabulary, which the base on the Hub does not hold."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file

from subspace_peft.adapter.embeddings import EMBEDDINGS, embeddings
from tests.cases import BY_NAME, move, settings, wrap
from tests.models import SMALL, TEXT


CASE = BY_NAME["llama"]
pytestmark = pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
RESIZED = "ignore:Setting `save_embedding_layers` to `True` as the embedding layer has been resized:UserWarning"
SIZE = TEXT["vocab_size"]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def hub(request, tmp_path):
    """A folder that stands for the base on the Hub."""
    config = transformers.LlamaConfig(
        **TEXT, **SMALL, num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=request.param
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def resized(hub, size=SIZE + 4):
    """The base with new tokens, whose rows are drawn anew at each call."""
    model = transformers.LlamaForCausalLM.from_pretrained(hub)
    model.resize_token_embeddings(size)
    return model.eval()


def logits(model):
    return model(torch.arange(SIZE - 6, SIZE + 4).view(2, 5)).logits


@torch.no_grad()
def check_reload(hub, tmp_path, **changes):
    """The reloaded model gives the logits of the saved one, to the last bit."""
    model = get_peft_model(resized(hub), settings(**changes)).eval()
    move(model, size=0.3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(resized(hub), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter(), model.disable_adapter():
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings(RESIZED)
@pytest.mark.parametrize("targets", ["all", "all-linear", ["embed_tokens"], ["lm_head", "q_proj"]], ids=str)
def test_rows_that_the_base_does_not_hold_are_saved(targets, hub, tmp_path):
    check_reload(hub, tmp_path, target_modules=targets)


@pytest.mark.filterwarnings(RESIZED)
@pytest.mark.parametrize("replace_weight", [False, True])
def test_they_are_saved_of_low_rank_coordinates_too(replace_weight, hub, tmp_path):
    check_reload(
        hub,
        tmp_path,
        target_modules=["embed_tokens", "q_proj"],
        coordinates="low_rank",
        rank=2,
        replace_weight=replace_weight,
    )


@pytest.mark.filterwarnings(RESIZED)
@torch.no_grad()
def test_the_file_holds_the_rows_of_the_base_while_an_adapter_is_merged(hub, tmp_path):
    model = get_peft_model(resized(hub), settings()).eval()
    move(model)
    before = get_peft_model_state_dict(model)
    model.merge_adapter()
    merged = get_peft_model_state_dict(model)
    assert list(merged) == list(before)
    for key in before:
        torch.testing.assert_close(merged[key], before[key], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings(RESIZED)
@torch.no_grad()
def test_they_load_where_other_adapters_wrap_the_embeddings(hub, tmp_path):
    model = get_peft_model(resized(hub), settings(target_modules=["q_proj"]), "attention").eval()
    model.add_adapter("embedding", settings(target_modules=["embed_tokens"], seed=1))
    move(model, "attention", size=0.3)
    model.save_pretrained(tmp_path, selected_adapters=["attention"])
    loaded = PeftModel.from_pretrained(resized(hub), tmp_path / "attention").eval()
    assert torch.equal(logits(loaded), logits(model))
    other = get_peft_model(resized(hub), settings(target_modules=["embed_tokens"], seed=1), "embedding").eval()
    other.load_adapter(tmp_path / "attention", "attention")
    other.set_adapter("attention")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("targets", ["all", ["embed_tokens"], ["lm_head"]], ids=str)
def test_embeddings_that_the_base_holds_are_not_saved(targets, hub, tmp_path):
    model = get_peft_model(resized(hub, SIZE), settings(target_modules=targets))
    model.save_pretrained(tmp_path / "adapter")
    assert sum(t.numel() for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()) == 7 + 8


@pytest.mark.parametrize("targets", ["all", ["lm_head"]], ids=str)
def test_both_are_saved_where_the_user_says_so(targets):
    model = wrap(CASE, target_modules=targets)
    saved = get_peft_model_state_dict(model, save_embedding_layers=True)
    base = CASE.model()
    for name, embedding in (("model.embed_tokens", base.model.embed_tokens), ("lm_head", base.lm_head)):
        (key,) = (key for key in saved if name in key)
        assert torch.equal(saved[key], embedding.weight)


def speech():
    config = transformers.Wav2Vec2Config(
        **SMALL,
        conv_dim=(8, 8),
        conv_kernel=(3, 3),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=12,
    )
    return transformers.Wav2Vec2ForCTC(config)


@pytest.mark.parametrize("save_embedding_layers", ["auto", True])
def test_a_base_without_input_embeddings_is_saved(save_embedding_layers, tmp_path):
    """Its output layer is called lm_head, for which PEFT asks for the embeddings."""
    torch.manual_seed(0)
    base = speech()
    assert [embeddings(base, getter) for getter in EMBEDDINGS] == [None, None]
    base.save_pretrained(tmp_path / "hub")
    torch.manual_seed(0)
    model = get_peft_model(speech(), settings()).eval()
    move(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save_embedding_layers)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        x = torch.randn(2, 50)
        assert torch.equal(loaded(x).logits, model(x).logits)


def test_an_injected_adapter_of_a_base_without_input_embeddings_is_saved():
    model = inject_adapter_in_model(settings(), speech())
    assert len(get_peft_model_state_dict(model)) == 2


def test_a_plain_module_has_no_embeddings_to_save():
    model = wrap(BY_NAME["mlp"])
    assert not hasattr(model, "get_input_embeddings")
    with pytest.warns(UserWarning, match="Could not identify embedding layer"):
        assert len(get_peft_model_state_dict(model, save_embedding_layers=True)) == 2


def test_the_embeddings_of_an_adapted_model_are_those_it_runs_with():
    model = wrap(CASE)
    inner = model.base_model.model
    assert model.get_input_embeddings() is inner.model.embed_tokens
    assert model.get_output_embeddings() is inner.lm_head
