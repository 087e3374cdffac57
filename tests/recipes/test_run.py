import gc
import multiprocessing
import subprocess
import sys
import weakref
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
from recipes.lab.sweep import Sweep
from recipes.reports.records import table
from recipes.training import kind, train
from tests.recipes.files import RECIPE_FILES, RECIPES, options, results


TINY = {
    "dataset": "digits",
    "model": "fc",
    "images": 256,
    "epochs": 1,
    "batch_size": 96,
    "seed": 0,
    "threads": 1,
    "d": 3,
}
TINY |= {"samples": 3, "trajectory.epochs": 3, "trajectory.batch_size": 96}


@pytest.mark.parametrize("file", [file for file in RECIPE_FILES if "\nkind: " not in f"\n{file.read_text()}"], ids=str)
def test_every_recipe_runs_tiny(file, tmp_path, capsys):
    tiny = TINY | ({"trajectory.epochs": 8} if "sample_steps" in file.read_text() else {})  # for three samples
    if "- timm/" in file.read_text() and not find_spec("timm"):
        pytest.skip("timm is not installed")
    assert read(file).runs or read(file).searches
    run.main([str(file), *options(tiny, tmp_path)])
    recipe = read(file, tiny)
    runs, report = recipe.runs, recipe.report.__name__.rpartition(".")[2]
    trajectories = {settings.trajectory.name for settings in runs if settings.trajectory}
    assert results(tmp_path).keys() == {settings.name for settings in runs} | trajectories
    words = {
        "dimension": "d_int90",
        "optimisers": "| final accuracy, % |" if file.stem == "rates" else " s a run |",
        "phases": "d*",
        "compression": "lottery",
    }
    words |= {"low_rank": "inner width"}
    assert words[report] in capsys.readouterr().out
    assert (tmp_path / "plots" / f"{file.stem}.png").stat().st_size > 10_000


SEARCHES = [file for file in RECIPE_FILES if "d: auto" in file.read_text() and "kind:" not in file.read_text()]


@pytest.mark.parametrize("file", SEARCHES, ids=str)
def test_every_search_runs_tiny(file, tmp_path, capsys):
    tiny = TINY | {"lr": 0.1, "threshold": 0.15, "d_min": 1, "d_max": 8, "seeds": 1, "max_runs": 3}
    del tiny["d"], tiny["seed"]
    run.main([str(file), *options(tiny, tmp_path)])
    asked = read(file, tiny).searches
    ended = {name for name, result in results(tmp_path).items() if "made" in result}
    assert ended == {search.name for search in asked}
    assert 1 <= len(results(tmp_path)) - len(asked) <= 3 * len(asked)
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
    monkeypatch.setattr(kind, "train", lambda settings, *rest: done.append(settings.d) or train.train(settings, *rest))
    run.main([str(recipe)])
    assert done == [4]


def test_a_stopped_run_leaves_nothing_behind(recipe, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run.main([str(recipe)])
    assert not (recipe.parent / "results").exists()


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


def test_the_command_line_is_a_module_too(recipe):
    command_line = [sys.executable, "-m", "recipes.run", str(recipe), "--report"]
    ended = subprocess.run(command_line, cwd=RECIPES.parent, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    said = ended.stderr.strip().splitlines()[-1]  # libraries may warn before
    assert said.startswith("A report needs results, tiny.yaml has none in")


def test_two_processes_train_one_run_together(recipe, tmp_path):
    """On the same global batches: theta_d is that of one process up to rounding."""
    launch = [
        Path(sys.executable).with_name("accelerate"),
        "launch",
        "--config_file",
        RECIPES / "accelerate" / "ddp.yaml",
        "--main_process_port",
        "0",
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
    [
        ("{", "A result must be JSON, got .*delete it"),
        ('{"D": 1}', "A result must hold its `settings`, .*delete it"),
        ('{"settings": {}, "D": 1}', "in the layout of this version, .*delete it"),
    ],
)
def test_a_result_that_cannot_be_read_is_named(recipe, text, message):
    (settings, *_), folder = read(recipe).runs, Results(recipe.parent)
    folder.folder.mkdir()
    folder.path(settings).write_text(text)
    with pytest.raises(ValueError, match=message):
        table([settings], folder)


def test_a_sweep_holds_no_model_that_it_has_made(recipe, monkeypatch):
    made = []

    def accelerator(**options):
        new = Accelerator(**options)
        made.append(weakref.ref(new))
        return new

    monkeypatch.setattr(kind, "Accelerator", accelerator)
    Sweep(kind.KIND, read(recipe).runs, recipe.parent).carry_out()
    assert len(results(recipe.parent)) == 3
    gc.collect()
    assert [reference() for reference in made] == [None] * 3
