"""The contract with PEFT: every behaviour that a PEFT method promises, on every case.

Two are left out. The number of trainable parameters does not depend on `layers_to_transform`, since there is one
theta_d however many layers it moves; PEFT exempts other methods with a shared vector too. PEFT offers hot-swapping and
PeftMixedModel to methods that it names (test_several_adapters.py tests the refusal).
"""

import copy
import os
import pickle

import pytest
import torch
from peft import PeftModel, get_base_model_state_dict, set_base_model_state_dict
from safetensors.torch import load_file
from torch import nn

from subspace_peft.adapter.layer import SubspaceLayer
from tests.cases import (
    BY_NAME,
    CASES,
    Case,
    assert_same_state,
    base_outputs,
    dense_P,
    loss,
    move,
    moved_base,
    outputs,
    tensors,
    theta_d,
    train,
    tree,
    wrap,
)


SEEDED = ["dense", "sparse", "fastjl", "kronecker"]
# PEFT warns that merging a tied weight might give wrong results; here it gives the right ones.
pytestmark = pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")


@pytest.fixture(params=CASES, ids=repr)
def case(request) -> Case:
    return request.param


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_before_training_the_outputs_are_the_bases_bit_for_bit(case):
    assert torch.equal(outputs(wrap(case), case), base_outputs(case))


def test_theta_is_every_parameter_but_rows_of_padding(case):
    model, base = wrap(case), case.model()
    embeddings = (module for module in base.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))
    padding = sum(module.embedding_dim for module in embeddings if module.padding_idx is not None)
    D = sum(p.numel() for p in base.parameters()) - padding
    assert model.peft_config["default"].D == model.base_model.D == D
    assert model.base_model.moved_share() == 1
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 7


def test_only_theta_d_trains(case):
    model = wrap(case)
    base = {name: p.clone() for name, p in model.named_parameters() if "theta_d" not in name}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.subspace_vectors.subspace_peft_theta_d.default.vector"
    ]
    train(model, case)
    assert theta_d(model).count_nonzero() == 7
    for name, p in model.named_parameters():
        if "theta_d" not in name:
            assert p.grad is None
            assert torch.equal(p, base[name]), name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_gradient_is_P_transposed_times_that_of_the_weights(case, training):
    check_gradient(case, wrap(case).train(training))


@pytest.mark.parametrize("projection", SEEDED)
@pytest.mark.parametrize("name", ["convnet", "gpt2"])
def test_the_gradient_is_exact_in_every_projection(name, projection):
    check_gradient(BY_NAME[name], wrap(BY_NAME[name], projection=projection, d=9).train())


def check_gradient(case: Case, model: nn.Module):
    move(model)
    loss(model, case.batch()).backward()
    plain = moved_base(case, model).train(model.training)
    loss(plain, case.batch()).backward()
    expected = sum(P.T @ plain.get_parameter(name).grad.flatten() for name, P in dense_P(model).items())
    scale = expected.abs().max()
    torch.testing.assert_close(theta_d(model).grad / scale, expected / scale, rtol=1e-4, atol=1e-4)


def test_outputs_are_those_of_origin_plus_P_theta_d(case):
    model = wrap(case, normalization="columns")
    move(model, size=1)
    assert not torch.equal(outputs(model, case), base_outputs(case))
    close(outputs(model, case), outputs(moved_base(case, model), case))


def test_saved_and_loaded_outputs_are_bit_equal(case, tmp_path):
    check_reloading(case, wrap(case), tmp_path)


@pytest.mark.parametrize("projection", SEEDED)
def test_every_projection_is_redrawn_bit_for_bit(projection, tmp_path):
    case = BY_NAME["convnet"]
    check_reloading(case, wrap(case, projection=projection), tmp_path)


def check_reloading(case: Case, model: nn.Module, tmp_path):
    train(model, case)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(case.model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(theta_d(loaded), theta_d(model))
        assert torch.equal(outputs(loaded, case), outputs(model, case))
    state = load_file(tmp_path / "adapter_model.safetensors")
    statistics = {name: tensor for name, tensor in state.items() if "running" in name or "num_batches" in name}
    assert set(state) - set(statistics) == {
        f"base_model.model.subspace_vectors.subspace_peft_{name}" for name in ("theta_d", "identity")
    }
    if not statistics:
        assert os.path.getsize(tmp_path / "adapter_model.safetensors") <= 4 * theta_d(model).numel() + 2048


def test_disabled_the_model_is_its_base(case):
    model = wrap(case)
    train(model, case)
    trained = outputs(model, case)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), base_outputs(case))
    assert torch.equal(outputs(model, case), trained)


def test_merge_and_unmerge(case):
    model = wrap(case)
    train(model, case)
    adapted = outputs(model, case)
    model.merge_adapter()
    close(outputs(model, case), adapted)
    model.unmerge_adapter()
    close(outputs(model, case), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        close(outputs(model, case), base_outputs(case))


def test_merge_and_unload_gives_a_plain_model(case):
    model = wrap(case)
    train(model, case)
    adapted = outputs(model, case)
    plain = model.merge_and_unload(safe_merge=True)
    assert tree(plain) == tree(case.model())
    close(outputs(plain, case), adapted)


def test_unload_gives_the_base_back(case):
    base = case.model()
    before, shape = tensors(base), tree(base)
    model = wrap(case)
    train(model, case)
    plain = model.unload()
    assert tree(plain) == shape
    assert_same_state(plain, before)


def test_the_bases_state_dict_is_the_plain_models(case):
    before = tensors(case.model())
    model = wrap(case)
    assert get_base_model_state_dict(model).keys() == before.keys()
    for name, tensor in get_base_model_state_dict(model).items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(1)
    moved = theta_d(model).clone()
    assert set_base_model_state_dict(model, before) == ([], [])
    for name, tensor in get_base_model_state_dict(model).items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(theta_d(model), moved)


def test_several_active_adapters_add_up(case):
    model = wrap(case)
    model.add_adapter("other", wrap(case, d=5, projection="sparse", seed=3).peft_config["default"])
    for name, seed in (("default", 1), ("other", 2)):
        move(model, name, seed=seed)
    plain = moved_base(case, model)
    with torch.no_grad():
        for name, P in dense_P(model, "other").items():
            parameter = plain.get_parameter(name)
            parameter.add_((P @ theta_d(model, "other")).view(parameter.shape))
    alone = outputs(model, case)
    model.base_model.set_adapter(["default", "other"])
    close(outputs(model, case), outputs(plain, case))
    model.set_adapter("default")
    assert torch.equal(outputs(model, case), alone)


def test_copies_and_pickles_are_whole_and_independent(case):
    model = wrap(case)
    train(model, case)
    trained = outputs(model, case)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, case), trained)
        vectors = {id(m.vectors) for m in twin.modules() if isinstance(m, SubspaceLayer)}
        assert vectors == {id(twin.base_model.model.subspace_vectors)}
        with torch.no_grad():
            theta_d(twin).add_(1)
        assert not torch.equal(outputs(twin, case), trained)
        assert torch.equal(outputs(model, case), trained)


def test_mixed_batch_or_a_clear_error(case):
    model = wrap(case)
    model.add_adapter("other", wrap(case, d=5, seed=3).peft_config["default"])
    for name, seed in (("default", 1), ("other", 2)):
        move(model, name, seed=seed)
    names = ["other", "default", "__base__"]
    if not case.mixed:
        with pytest.raises(ValueError, match="adapter_names"):
            outputs(model, case, adapter_names=names)
        return
    with model.disable_adapter():
        rows = [outputs(model, case)[2]]
    for name in ("default", "other"):
        model.set_adapter(name)
        rows.insert(0, outputs(model, case)[0 if name == "other" else 1])
    close(outputs(model, case, adapter_names=names), torch.stack(rows))
