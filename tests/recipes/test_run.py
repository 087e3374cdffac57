import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import evaluate
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from recipes import run
from recipes.lab.grid import read
from recipes.lab.results import Results
from recipes.lab.sharing import helped_by
from recipes.tasks.models import build
from recipes.training import train
from recipes.training.settings import Settings
from subspace_peft import Trajectory
from tests.recipes.files import options, results, written


RECIPES = Path(run.__file__).parent
APART = {file for recipe in ("accelerate", "vit_lora", "spectra") for file in RECIPES.glob(f"{recipe}/*")}
"""YAML files that are not for run.py."""
TINY = {
    "dataset": "digits",
    "model": "fc",
    "images": 256,
    "epochs": 1,
    "batch_size": 128,
    "seed": 0,
    "threads": 1,
    "d": 3,
}
TINY |= {"samples": 3, "trajectory.epochs": 3, "trajectory.batch_size": 128}


@pytest.fixture
def recipe(tmp_path) -> Path:
    settings = ["model: fc", "batch_size: 256", "epochs: 2", "lr: 0.1", "projection: [full, fastjl]", "d: [3, 4]"]
    return written(tmp_path / "tiny.yaml", *settings, "threads: 1")


@pytest.fixture
def unreported(monkeypatch):
    """Tables and figures are not what the test is about, and take longer than its runs."""
    monkeypatch.setattr(run, "conclude", lambda *rest: None)


@pytest.mark.parametrize("file", sorted(set(RECIPES.glob("*/*.yaml")) - APART), ids=str)
def test_every_recipe_runs_tiny(file, tmp_path, capsys):
    tiny = TINY | ({"trajectory.epochs": 8} if "sample_steps" in file.read_text() else {})  # for three samples
    if "timm/" in file.read_text() and not find_spec("timm"):
        pytest.skip("timm is not installed")
    assert read(file).runs or read(file).searches
    run.main([str(file), *options(tiny, tmp_path)])
    recipe = read(file, tiny)
    runs, report = recipe.runs, recipe.report
    trajectories = {settings.trajectory.name for settings in runs if settings.trajectory}
    assert results(tmp_path).keys() == {settings.name for settings in runs} | trajectories
    words = {"dimension": "d_int90", "methods": "s with sampling", "phases": "d*", "compression": "lottery"}
    words |= {"low_rank": "inner width"}
    assert words[report] in capsys.readouterr().out
    assert (tmp_path / "plots" / f"{file.stem}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "file", [file for file in sorted(RECIPES.glob("*/*.yaml")) if "d: auto" in file.read_text()], ids=str
)
def test_every_search_runs_tiny(file, tmp_path, capsys):
    tiny = TINY | {"lr": 0.1, "threshold": 0.15, "d_min": 1, "d_max": 8, "seeds": 1, "max_runs": 3}
    del tiny["d"], tiny["seed"]
    run.main([str(file), *options(tiny, tmp_path)])
    asked = read(file, tiny).searches
    assert {file.stem for file in (tmp_path / "searches").iterdir()} == {search.name for search in asked}
    assert 1 <= len(results(tmp_path)) <= 3 * len(asked)
    assert "| 15.00 | " in capsys.readouterr().out
    assert (tmp_path / "plots" / f"{file.stem}.png").stat().st_size > 10_000


@pytest.mark.usefixtures("unreported")
def test_a_result_says_what_was_run_and_on_what(recipe):
    run.main([str(recipe)])
    found = results(recipe.parent)
    assert found.keys() == {settings.name for settings in read(recipe).runs}
    result = next(r for r in found.values() if r["settings"]["d"] == 4)
    assert result["D"] == 3466
    assert result["d"] == 4
    assert len(result["epochs"]) == 2
    assert result["final_accuracy"] == pytest.approx(result["epochs"][-1]["test_accuracy"])
    assert result["best_accuracy"] == max(epoch["test_accuracy"] for epoch in result["epochs"])
    assert result["versions"]["torch"] == torch.__version__
    assert result["seconds"].keys() == {"setup", "train"}
    assert {"cpu", "cores", "threads", "gpu", "load"} <= result["hardware"].keys()


@pytest.mark.usefixtures("unreported")
def test_what_has_a_result_is_not_run_again(recipe, monkeypatch):
    run.main([str(recipe), "--d", "3"])
    done = []
    monkeypatch.setattr(run, "train", lambda settings, *rest: done.append(settings.d) or train.train(settings, *rest))
    run.main([str(recipe)])
    assert done == [4]


def test_a_stopped_run_leaves_nothing_behind(recipe, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run.main([str(recipe)])
    assert list((recipe.parent / "results").iterdir()) == []


def test_a_lock_holds_while_its_owner_lives(tmp_path):
    settings, runs = Settings(), Results(tmp_path)
    assert runs.take(settings)
    assert not runs.take(settings)
    owner = tmp_path / f"{settings.name}.lock" / "owner"
    owner.write_text("another-machine 1")
    assert not runs.take(settings)
    ended = subprocess.Popen(["true"])
    ended.wait()
    owner.write_text(f"{socket.gethostname()} {ended.pid}")
    assert runs.take(settings)
    assert owner.read_text().split()[1] == str(os.getpid())
    runs.release(settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["recipe", "dldr"])
def test_two_processes_share_a_sweep(kind, request):
    file = request.getfixturevalue(kind)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["recipes.run"])  # imported once, for all of them
    workers = [processes.Process(target=run.main, args=([str(file), "--seed", "0", "1"],)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(results(file.parent)) == 6
    assert not list((file.parent / "results").glob("*.lock"))


def test_workers_share_a_sweep_and_one_of_them_reports(recipe, capsys):
    run.main([str(recipe), "--seed", "0", "1", "--workers", "2"])
    made = results(recipe.parent)
    assert len(made) == 6
    assert "of 6 runs have no result" not in capsys.readouterr().out
    assert not list((recipe.parent / "results").glob("*.lock"))


@pytest.mark.parametrize("workers", ["-1", "some"])
def test_workers_are_a_number(recipe, workers, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        run.main([str(recipe), "--workers", workers])
    said = f"{error.value} {capsys.readouterr().err}"
    assert f"got {workers}" in said or f"'{workers}'" in said


def test_a_worker_that_fails_is_told(recipe):
    with (
        pytest.raises(RuntimeError, match="(?s)A helping process failed.*no such thing"),
        helped_by(1, ["-c", "raise ValueError('no such thing')"]),
    ):
        pass


def test_two_processes_train_one_run_together(recipe, tmp_path):
    """On the same global batches: theta_d is that of one process up to rounding."""
    launch = [
        Path(sys.executable).with_name("accelerate"),
        "launch",
        "--config_file",
        RECIPES / "accelerate" / "ddp.yaml",
    ]
    changes = {"d": 4, "projection": "fastjl", "save_adapter": "true"}
    command = [*launch, RECIPES / "run.py", recipe, *options(changes, tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True)
    run.main([str(recipe), *options(changes, tmp_path / "one")])
    one, two = (load_file(next((tmp_path / name / "adapters").glob("*/*.safetensors"))) for name in ("one", "two"))
    assert [r["processes"] for r in results(tmp_path / "two").values()] == [2]
    for key, theta_d in one.items():
        torch.testing.assert_close(two[key], theta_d, rtol=1e-3, atol=1e-4)


def test_the_adapter_of_a_run_is_proved(recipe, capsys):
    run.main([str(recipe), "--d", "4", "--save_adapter", "true"])
    proofs = [r["adapter"] for r in results(recipe.parent).values() if "adapter" in r]
    assert [proof["max_difference"] for proof in proofs] == [0.0]
    assert "reloaded adapter: outputs equal (max difference 0.0)" in capsys.readouterr().out


@pytest.fixture
def dldr(tmp_path) -> Path:
    shared = ["report: methods", "model: fc", "batch_size: 256", "threads: 1", "runs:"]
    sgd = "  - &sgd {optimizer: sgd, lr: 0.1, epochs: 4}"
    basis = "  - {projection: basis, d: 2, samples: 3, trajectory: *sgd, optimizer: [pbfgs, pplusbfgs], epochs: 1}"
    return written(tmp_path / "dldr.yaml", *shared, sgd, basis)


def test_a_basis_comes_from_the_trajectory_of_another_run(dldr, capsys):
    run.main([str(dldr)])
    sgd, *others = read(dldr).runs
    assert {other.trajectory.name for other in others} == {sgd.name}
    assert Trajectory(dldr.parent / "trajectories" / sgd.name).steps == [0, 1, 2, 3, 4]
    found = results(dldr.parent)
    assert found.keys() == {settings.name for settings in (sgd, *others)}
    assert [found[other.name]["d"] for other in others] == [2, 2]
    assert "P⁺-BFGS" in capsys.readouterr().out


@pytest.mark.usefixtures("unreported")
def test_a_basis_is_of_the_first_samples_of_the_trajectory(dldr):
    run.main([str(dldr)])
    _, settings, _ = read(dldr).runs
    folder = dldr.parent / "trajectories" / settings.trajectory.name
    model = train.wrap(build(settings.model, settings.dataset), settings, folder)
    basis = Trajectory(folder, last=3).basis(2)
    move = model.base_model.model[1].get_delta_weight
    model.base_model.model.subspace_vectors.subspace_peft_theta_d["default"].data = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(move("default"), basis["1.weight"][..., 0])


@pytest.mark.usefixtures("unreported")
def test_a_trajectory_that_is_gone_is_recorded_again_where_a_run_needs_it(dldr):
    run.main([str(dldr)])
    sgd, other, _ = read(dldr).runs
    before = results(dldr.parent)[sgd.name]
    shutil.rmtree(dldr.parent / "trajectories")
    run.main([str(dldr)])
    assert not (dldr.parent / "trajectories").exists()
    (dldr.parent / "results" / f"{other.name}.json").unlink()
    run.main([str(dldr)])
    assert results(dldr.parent)[sgd.name] == before
    assert len(Trajectory(dldr.parent / "trajectories" / sgd.name)) == 5


@pytest.mark.usefixtures("unreported")
def test_losses_that_are_no_numbers_are_recorded_as_none(recipe):
    run.main([str(recipe), "--projection", "full", "--lr", "1e30"])
    (result,) = results(recipe.parent).values()
    assert result["epochs"][-1]["train_loss"] is None


def test_accuracy_is_evaluates():
    metric = evaluate.load(str(train.ACCURACY), keep_in_memory=True)
    assert metric.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "A result must be JSON, got .*delete it"), ('{"D": 1}', "in the layout of this version, .*delete it")],
)
def test_a_result_that_cannot_be_read_is_named(recipe, text, message):
    (settings, *_), folder = read(recipe).runs, Results(recipe.parent / "results")
    folder.path(settings).write_text(text)
    with pytest.raises(ValueError, match=message):
        folder.table([settings])


def test_a_sweep_holds_no_model_that_it_has_made(recipe):
    accelerator = Accelerator(cpu=True)
    sweep = run.Sweep(read(recipe).runs, recipe.parent, accelerator)
    sweep.carry_out()
    assert len(results(recipe.parent)) == 3
    assert not accelerator._models
    assert not accelerator._optimizers
