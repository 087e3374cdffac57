"""The measurements of recipes/speed, tiny: what they compare and write. The times themselves prove nothing."""

import gc

import pytest
import torch
from peft import get_peft_model
from torch import nn

from recipes.lab.results import read_measurement
from recipes.speed import distortion, gpu, layer, models, optimiser, pca, projections, setup, step, sweeps
from subspace_peft import SubspaceConfig


@pytest.fixture
def record(tmp_path, capsys):
    """What a script writes; it reports the same tables from its file."""

    def run(script, *arguments: str) -> dict:
        script.main([*arguments, "--output", str(tmp_path / "new")])
        file = tmp_path / "new" / f"{script.__name__.split('.')[-1]}.jsonl"
        assert [each for each in file.parent.iterdir() if each.name != "plots"] == [file]
        measured = read_measurement(file)
        assert {"versions", "hardware", "commit"} <= set(measured)
        assert {len(load) for load in measured["load"].values()} == {3}
        printed = capsys.readouterr().out
        written = file.read_bytes()
        script.main(["--report", "--output", str(file.parent)])
        reported = capsys.readouterr().out
        assert "| --- |" in reported
        assert printed.endswith(reported)
        assert file.read_bytes() == written
        return measured

    return run


def test_projections_beside_a_copy_a_butterfly_and_peft(record, monkeypatch):
    monkeypatch.setattr(projections, "SIZES", {"tiny": (20, [96, 12], 2)})
    methods = projections.measure("tiny", None, 1)["methods"]
    assert list(methods) == list(projections.METHODS)
    assert methods["copy"]["of_copy"] == methods["butterfly fastfood"]["times_faster_than_butterfly"] == 1
    measured = record(projections, "--sizes", "tiny", "--methods", "copy", "butterfly fastfood", "fastjl")["sizes"][
        "tiny"
    ]
    assert (measured["D"], measured["d"]) == (108, 20)
    ours, butterfly = (measured["methods"][name] for name in ("fastjl", "butterfly fastfood"))
    assert ours["times_faster_than_butterfly"] == pytest.approx(butterfly["ms"] / ours["ms"], abs=0.1)


def test_a_training_step(record, monkeypatch):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    monkeypatch.setattr(step, "SHAPE", small)
    monkeypatch.setattr(step, "IMAGES", {"image_size": 8, "patch_size": 4, "num_labels": 3})
    monkeypatch.setattr(step, "BATCH", 2)
    monkeypatch.setattr(step, "D_SMALL", 16)
    monkeypatch.setattr(step, "RANK", 2)
    chosen = ["full", "lora", "fastjl", "low_rank identity"]
    methods = record(step, "--rounds", "2", "--warm-up", "1", "--methods", *chosen)["methods"]
    assert list(methods) == chosen
    assert methods["full"]["ratio_by_round"] == 1
    assert methods["fastjl"]["trained"] == 16
    assert methods["lora"]["trained"] == methods["low_rank identity"]["trained"]


def test_saved_bytes_are_of_all_tensors_that_are_saved_and_none_stays():
    before = {id(each) for each in gc.get_objects() if isinstance(each, torch.Tensor)}
    contender, kept = step.Contender("lora", *models.llama(512, 32, 1)()), []

    def pack(x):
        kept.append(x.detach())

    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        contender.model(**contender.inputs)
    parameters = {p.data_ptr() for p in contender.model.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    expected = sum(size for place, size in storages.items() if place not in parameters)
    assert contender.saved_bytes() == expected > 10**6
    del contender
    kept.clear()
    gc.collect()
    left = (each for each in gc.get_objects() if isinstance(each, torch.Tensor) and id(each) not in before)
    assert sum(each.nbytes for each in left) < 10**5


def test_one_layer(record, monkeypatch):
    monkeypatch.setattr(layer, "SIZES", {"256x256": 8})
    monkeypatch.setattr(layer, "D_SMALL", 16)
    methods = record(layer, "--rounds", "2")["sizes"]["256x256"]["methods"]
    assert list(methods) == list(layer.METHODS)
    assert methods["frozen"] | {"of_frozen": 1, "extra_mb": 0} == methods["frozen"]
    assert methods["kronecker"]["extra_mb"] < methods["lora"]["extra_mb"] < methods["full"]["extra_mb"]


def test_whole_models(record, monkeypatch):
    monkeypatch.setattr(models, "MODELS", {"tiny": models.llama(512, 32, 1)})
    monkeypatch.setattr(models, "TOKENS", 4)
    methods = record(models, "--rounds", "1", "--models", "tiny")["models"]["tiny"]
    assert list(methods) == list(models.METHODS)
    assert methods["lora"]["of_lora"] == methods["full"]["of_full"] == 1
    assert methods["kronecker"]["held_mb"] <= methods["lora"]["held_mb"] < methods["full"]["held_mb"]
    assert 0 < methods["kronecker"]["peak_mb"] < methods["full"]["peak_mb"]
    monkeypatch.setattr(models, "METHODS", ("full", "lora", "kronecker"))
    monkeypatch.setitem(models.MODELS, "other", models.llama(512, 16, 1))
    later = record(models, "--rounds", "0", "--models", "other")
    assert list(later["models"]) == ["tiny", "other"]
    assert later["models"]["tiny"] == methods
    assert {key: later["earlier"]["tiny"][key] for key in ("rounds", "d")} == {"rounds": 1, "d": step.D_SMALL}
    assert {"versions", "hardware", "commit", "load"} <= set(later["earlier"]["tiny"])
    assert set(later["models"]["other"]["kronecker"]) == {"held_mb", "peak_mb"}
    again = record(models, "--rounds", "1", "--models", "tiny")
    assert (list(again["models"]), list(again["earlier"])) == (["tiny", "other"], ["other"])
    assert again["earlier"]["other"]["rounds"] == 0


def test_what_a_gpu_would_measure(record, monkeypatch):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 30}
    images = {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    models = {
        "Llama 1B": lambda: gpu.llama(1, 4, **small, **text),
        "ViT-B/16": lambda: gpu.vit(1, **small, **images),
    }
    monkeypatch.setattr(gpu, "MODELS", models)
    monkeypatch.setattr(step, "D_SMALL", 16)
    monkeypatch.setattr(step, "RANK", 2)
    monkeypatch.setattr(gpu, "tests", lambda device: {"exit_status": 0, "summary": device, "failed": []})
    measured = record(gpu, "--rounds", "1", "--device", "cpu")
    assert list(measured["models"]) == list(models)
    for methods in measured["models"].values():
        assert list(methods) == list(gpu.METHODS)
        assert methods["kronecker"]["trained"] == 16
        assert methods["full"]["of_full"] == methods["lora"]["of_lora"] == 1


def test_the_tests_of_a_gpu_are_run_and_their_failures_named(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(
        'def pytest_addoption(parser):\n    parser.addoption("--device")\n'
    )
    (tmp_path / "tests" / "test_gpu.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    ended = gpu.tests("cpu")
    assert ended["exit_status"] == 1
    assert ended["failed"] == ["FAILED tests/test_gpu.py::test_b"]
    assert ended["summary"] == "1 failed, 1 passed"


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`--device cuda` needs a GPU"):
        gpu.main([])


def test_setting_up(record, monkeypatch):
    monkeypatch.setattr(setup, "vit", lambda: nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5)))
    monkeypatch.setattr(setup, "llama", lambda: nn.Sequential(nn.Linear(300, 400, device="meta")))
    monkeypatch.setattr(setup, "D_SMALL", 64)
    monkeypatch.setattr(setup, "FILE_SIZES", (64, 1000))
    measured = record(setup)
    cached = {row["projection"]: row["state_bytes_an_entry"] for row in measured["wrapping"] if row["cache"]}
    assert set(cached) == set(setup.PROJECTIONS)
    assert all(cached.values())
    assert not any(row["state_bytes_an_entry"] for row in measured["wrapping"] if not row["cache"])
    assert all(0 < file["beyond_4d"] <= 2048 for file in measured["files"])
    assert {row["projection"] for row in measured["large"]} == set(setup.OF_BITS)


def test_kronecker_holds_a_twentieth_of_a_byte_a_weight():
    """The layers of a small ViT: what is mixed, biases, a head of an odd size."""
    model = nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 1536), nn.Linear(1536, 384), nn.Linear(384, 1001))
    model = get_peft_model(model, SubspaceConfig(d=1000, projection="kronecker", target_modules="all-linear"))
    model(torch.randn(3, 384)).sum().backward()
    assert sum(bool(projection.mixing._drawn) for projection in setup.projections(model)) == 4
    assert 1000 < setup.storages(model) < 0.05 * model.peft_config["default"].D


def test_the_distortion_of_the_published_operator(record, monkeypatch):
    monkeypatch.setattr(distortion, "SHAPE", (64, 64))
    monkeypatch.setattr(distortion, "N", 4096)
    rows = {row["operator"]: row for row in record(distortion, "--d", "1000")["operators"]}
    assert rows["published"]["never_moved"] > 0.2 > rows["fastjl"]["never_moved"] == 0
    assert rows["fastjl"]["column_norms_max_over_min"] == pytest.approx(1, abs=1e-5)


def test_bases_of_a_trajectory(record, monkeypatch):
    monkeypatch.setattr(pca, "in_its_own_process", lambda *_: None)
    measured = record(pca, "--rounds", "1", "--entries", "2000", "--samples", "12", "--d", "3")
    assert (measured["D"], measured["samples"], measured["d"]) == (2000, 12, 3)
    assert list(measured["methods"]) == list(pca.METHODS)
    assert all(method["error"] < 1e-5 for method in measured["methods"].values())


def test_more_components_than_the_trajectory_has_are_refused():
    with pytest.raises(ValueError, match="`--d` must be at most the 11 components of the trajectory, got 12"):
        pca.main(["--samples", "12", "--d", "12"])


def test_runs_alone_and_together(record, monkeypatch):
    monkeypatch.setitem(sweeps.CASES, ("fc", "digits", "dense"), (10, 16))
    monkeypatch.setattr(sweeps, "WHOLE", 2)
    tiny = ["--rounds", "1", "--runs", "1", "6", "--cases", "fc digits dense", "--whole", "fastjl"]
    measured = record(sweeps, *tiny)
    assert measured["d and batch"] == {"fc digits dense": [10, 16]}
    assert [result["runs"] for result in measured["cases"]["fc digits dense"]] == [1, 6]
    for result in measured["cases"]["fc digits dense"]:
        assert list(result["step"]) == ["alone", "in turn", "side by side"]
        assert result["step"]["alone"]["gain"] == result["setup"]["alone"]["gain"] == 1
    assert list(measured["whole"]["fastjl"]) == ["alone", "together"]


def test_a_step_of_an_optimiser(record):
    methods = record(optimiser, "--rounds", "2", "--warm-up", "1", "--dataset", "digits", "--batch", "8")["methods"]
    assert methods["sgd"]["of_sgd"] == 1
    assert methods["forward"]["trials"] == methods["sgd"]["trials"] == 0
    assert all(
        methods[f"{name} {y}"]["trials"] >= 1 for name in ("pbfgs", "pplus") for y in ("same_batch", "next_batch")
    )
