"""Renamed base models: an adapter goes by the names that its base had when it was made."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.walk import unique_coordinates
from tests.adapter.test_golden_adapter import ADAPTERS, FOLDER, base, inputs
from tests.cases import BY_NAME, dense_P, move, outputs, refused, settings, theta_d, train, wrap


CONVNET, LLAMA, VIT = (BY_NAME[name] for name in ("convnet", "llama", "vit"))
OLD_NAMES = {r"^body\.": ""}


class Body(nn.Module):
    """A model in which another has the name `body`."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, *args, **kwargs):
        return self.body(*args, **kwargs)


def config_of(folder, **changes) -> SubspaceConfig:
    config = SubspaceConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def on_renamed(model: nn.Module, folder, **kwargs) -> PeftModel:
    return PeftModel.from_pretrained(Body(model), folder, config=config_of(folder, renamed=OLD_NAMES), **kwargs).eval()


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_a_golden_adapter_has_the_same_P_on_the_renamed_base(name):
    model = PeftModel.from_pretrained(base(name), FOLDER / name).eval()
    renamed = on_renamed(base(name), FOLDER / name)
    assert torch.equal(renamed(inputs(name)), model(inputs(name)))
    assert renamed.peft_config["default"].fingerprint == model.peft_config["default"].fingerprint


@pytest.mark.parametrize("projection", ["identity", "basis", "coordinate"])
def test_rows_of_a_P_that_no_seed_draws_go_by_the_old_names(projection, tmp_path):
    D = sum(p.numel() for p in CONVNET.model().parameters())
    generator = torch.Generator().manual_seed(0)
    given = {
        "identity": {},
        "basis": {"basis": torch.linalg.qr(torch.randn(D, 4, generator=generator))[0]},
        "coordinate": {"mask": torch.rand(D, generator=generator) < 0.1},
    }
    model = wrap(CONVNET, projection=projection, d=None, **given[projection])
    move(model, size=0.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(on_renamed(CONVNET.model(), tmp_path), CONVNET), outputs(model, CONVNET))


def test_statistics_are_saved_under_the_old_names(tmp_path):
    model = wrap(CONVNET)
    train(model, CONVNET)
    model.save_pretrained(tmp_path / "old")
    renamed = on_renamed(CONVNET.model(), tmp_path / "old")
    assert torch.equal(outputs(renamed, CONVNET), outputs(model, CONVNET))
    renamed.save_pretrained(tmp_path / "new")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "new" / weights).read_bytes() == (tmp_path / "old" / weights).read_bytes()
    for original in (CONVNET.model(), Body(CONVNET.model())):  # the config keeps `renamed`
        loaded = PeftModel.from_pretrained(original, tmp_path / "new").eval()
        assert torch.equal(outputs(loaded, CONVNET), outputs(model, CONVNET))


def test_a_second_adapter_and_modules_to_save(tmp_path):
    case = BY_NAME["mlp"]
    model = wrap(case, target_modules=["fc1"], modules_to_save=["fc2"])
    train(model, case)
    model.save_pretrained(tmp_path)
    other = get_peft_model(Body(case.model()), settings(target_modules=["body.fc1"], seed=5))
    other.add_adapter("two", config_of(tmp_path, renamed=OLD_NAMES))
    other.load_adapter(tmp_path, "two", key_mapping={"^fc": "body.fc"})
    other.set_adapter("two")
    assert torch.equal(outputs(other.eval(), case), outputs(model, case))


def test_a_mapping_of_all_keys_leaves_theta_d_where_it_is(tmp_path):
    model = wrap(CONVNET)
    train(model, CONVNET)
    model.save_pretrained(tmp_path)
    renamed = on_renamed(CONVNET.model(), tmp_path, key_mapping={"^(.+)": r"body.\1"})
    assert torch.equal(outputs(renamed, CONVNET), outputs(model, CONVNET))


def test_a_new_adapter_can_go_by_old_names():
    model = wrap(CONVNET)
    renamed = get_peft_model(Body(CONVNET.model()), settings(renamed=OLD_NAMES)).eval()
    assert list(unique_coordinates(renamed, "default")) == list(unique_coordinates(model, "default"))
    for one in (model, renamed):
        move(one)
    assert torch.equal(outputs(renamed, CONVNET), outputs(model, CONVNET))


# ----------------------------------------------------------------------------------- renamed by transformers


def vit_of_transformers_4() -> dict[str, str]:
    """The names of ViT's tensors in transformers 4, in their order there, and what they are called now."""
    embeddings = ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"]
    modules = {"vit.embeddings.patch_embeddings.projection": "vit.embeddings.patch_embeddings.projection"}
    for layer in range(2):
        then, now = f"vit.encoder.layer.{layer}", f"vit.layers.{layer}"
        modules |= {
            f"{then}.attention.attention.query": f"{now}.attention.q_proj",
            f"{then}.attention.attention.key": f"{now}.attention.k_proj",
            f"{then}.attention.attention.value": f"{now}.attention.v_proj",
            f"{then}.attention.output.dense": f"{now}.attention.o_proj",
            f"{then}.intermediate.dense": f"{now}.mlp.fc1",
            f"{then}.output.dense": f"{now}.mlp.fc2",
            f"{then}.layernorm_before": f"{now}.layernorm_before",
            f"{then}.layernorm_after": f"{now}.layernorm_after",
        }
    modules |= {"vit.layernorm": "vit.layernorm", "classifier": "classifier"}
    tensors = dict(zip(embeddings, embeddings, strict=True))
    return tensors | {
        f"{then}.{path}": f"{now}.{path}" for then, now in modules.items() for path in ("weight", "bias")
    }


def tree_of(tensors: dict[str, Tensor]) -> nn.Module:
    """A model that owns these tensors by these names, and computes nothing."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for child in path:
            if child not in module._modules:
                module.add_module(child, nn.Module())
            module = module._modules[child]
        module.register_parameter(last, nn.Parameter(tensor.detach().clone()))
    return root


@pytest.mark.parametrize("targets", ["all", ["query", "value"]], ids=["all", "names"])
@pytest.mark.parametrize("loads", ["peft", "transformers"])
@torch.no_grad()
def test_the_names_of_older_checkpoints_are_found_by_the_fingerprint(loads, targets, tmp_path):
    """Without a word from the user. The order of ViT's modules changed too."""
    names, expected = vit_of_transformers_4(), VIT.model()
    tree = tree_of({then: expected.get_parameter(now) for then, now in names.items()})
    old = get_peft_model(tree, settings(target_modules=targets))
    move(old, size=0.5)
    old.save_pretrained(tmp_path)
    for then, P in dense_P(old).items():
        parameter = expected.get_parameter(names[then])
        parameter.add_((P @ theta_d(old)).view(parameter.shape))
    if loads == "peft":
        model = PeftModel.from_pretrained(VIT.model(), tmp_path).eval()
    else:
        model = VIT.model()
        model.load_adapter(str(tmp_path))
    torch.testing.assert_close(outputs(model, VIT), outputs(expected, VIT), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(model, VIT), outputs(VIT.model(), VIT), atol=1e-2)
    assert all(torch.equal(P, dense_P(old)[name]) for name, P in dense_P(model).items())


def test_transformers_loads_with_a_config_that_says_the_old_names(tmp_path):
    model = wrap(LLAMA, target_modules=["q_proj", "v_proj"], renamed={r"^model\.layers\.": "blocks."})
    move(model, size=0.5)
    model.save_pretrained(tmp_path)
    assert "blocks.0.self_attn.q_proj.weight" in unique_coordinates(model, "default")
    other = LLAMA.model()
    other.load_adapter(str(tmp_path), peft_config=config_of(tmp_path))
    assert torch.equal(outputs(other, LLAMA), outputs(model, LLAMA))


# ------------------------------------------------------------------------------------------------------ errors


def test_a_renamed_base_is_refused_until_its_old_names_are_told(tmp_path):
    wrap(CONVNET).save_pretrained(tmp_path)
    model = Body(CONVNET.model())
    with refused(model, "is `body.conv1.weight` .* say in `renamed` what its modules were called"):
        PeftModel.from_pretrained(model, tmp_path, config=config_of(tmp_path, target_modules={"conv1", "bn1"}))


def test_two_tensors_cannot_have_one_old_name():
    model = CONVNET.model()
    with refused(model, "`renamed` must give each target tensor a name of its own, but several are called `x.weight`"):
        get_peft_model(model, settings(target_modules=["x"], renamed={r"^(conv1|head)": "x"}))


@pytest.mark.parametrize("wrong", [["body"], {"(": ""}, {"^body": None}, {"^(body)": r"\2"}, "body"], ids=str)
def test_wrong_patterns_are_refused(wrong):
    with pytest.raises(ValueError, match="`renamed` must map regular expressions"):
        settings(renamed=wrong)


def test_a_config_without_it_is_written_as_before(tmp_path):
    wrap(CONVNET).save_pretrained(tmp_path)
    assert "renamed" not in json.loads((tmp_path / "adapter_config.json").read_text())
