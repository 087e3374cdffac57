import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from recipes import run
from recipes.lab import search
from recipes.lab.grid import read
from recipes.lab.grid import searches as requests_of
from recipes.lab.results import Results
from recipes.pretrained.kind import KIND as PRETRAINED
from recipes.reports import searches as table
from recipes.training import kind
from recipes.training.settings import Settings
from tests.recipes.files import RECIPES, options, results, written
from tests.recipes.files import requests as searches
from tests.recipes.files import runs as grid


@pytest.fixture
def recipe(tmp_path):
    shared = ["model: fc", "batch_size: 128", "epochs: 2", "threads: 1", "runs:"]
    full = "  - {projection: full, lr: 0.003, seed: [0, 1]}"
    auto = "  - {projection: fastjl, lr: 0.5, d: auto, fraction: 0.3, d_max: 64, max_runs: 12, seeds: 3}"
    return written(tmp_path / "auto.yaml", *shared, full, auto)


def outcome(folder):
    (search,) = read(folder / "auto.yaml").searches
    return Results(folder).load(search)


def test_a_search_finds_the_d_that_reaches_a_share_of_full_training(recipe, capsys):
    run.main([str(recipe)])
    found, (asked,) = outcome(recipe.parent), read(recipe).searches
    full = [results(recipe.parent)[run.name]["final_accuracy"] for run in read(recipe).runs]
    assert found["goal"] == pytest.approx(0.3 * sum(full) / 2)
    low, high = found["interval"]
    assert low <= found["d"] <= (high or 64)
    assert len(found["made"]) == len(set(map(tuple, found["made"]))) <= 12
    assert {asked.run(*point).name for point in found["made"]} <= results(recipe.parent).keys()
    printed, bar = capsys.readouterr()
    n = len(found["made"])
    assert f"{n} of at most {n} runs" in bar.splitlines()[-1]
    assert f"| FC | FastJL | {100 * found['goal']:.2f} | {found['d']} |" in printed
    assert (recipe.parent / "plots" / "auto.png").stat().st_size > 10_000


def test_a_search_that_was_stopped_goes_on_where_it_was(recipe, monkeypatch):
    train, made = kind.train, []
    command = [str(recipe), "--epochs", "1", "--images", "256", "--max_runs", "6"]

    def failing(settings, *rest):
        made.append(settings.name)
        if len(made) == 5:
            raise KeyboardInterrupt
        return train(settings, *rest)

    monkeypatch.setattr(kind, "train", failing)
    monkeypatch.setattr(run, "conclude", lambda *rest: None)
    with pytest.raises(KeyboardInterrupt):
        run.main(command)
    (asked,) = read(recipe).searches
    assert not Results(recipe.parent).has(asked)
    run.main(command)
    assert made.count(made[4]) == 2
    assert len(made) == len(set(made)) + 1
    run.main(command)
    assert len(made) == len(set(made)) + 1


def test_a_d_that_is_given_is_no_search(recipe):
    found = read(recipe, {"d": ["3"]})
    assert not found.searches
    assert [s.d for s in found.runs if s.projection == "fastjl"] == [3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": None}, "`d: auto` needs `threshold`, a test accuracy, or `fraction`, of full training"),
        ({"fraction": 0.9}, "`d: auto` needs `threshold`, a test accuracy, or `fraction`"),
        ({"d_max": None}, "`d: auto` needs `d_max`"),
        ({"threshold": [0.8, 0.9]}, "`threshold` of `d: auto` must be one value"),
        ({"threshold": 85}, "must be above 0 and at most 1, got 85.0"),
        ({"d_min": 9}, "`d_max` of `d: auto` must be at least `d_min`"),
        ({"projection": "full"}, "`threshold` belongs to `d: auto`, got it with projection 'full'"),
        ({"projection": ["full", "fastjl"]}, "`d: auto` needs a `projection` that has a d, got 'full'"),
        ({"projection": None}, "`d: auto` needs a `projection` that has a d, got 'full'"),
        ({"projection": "identity"}, "`d: auto` needs a `projection` that has a d, got 'identity'"),
        ({"max_runs": 0}, "`max_runs` of `d: auto` must be at least 1, got 0"),
        ({"probability": 2}, "`probability` of `d: auto` must be between 0 and 1"),
        ({"threshold": "high"}, "`threshold` must be of type float, got 'high'"),
    ],
)
def test_what_cannot_be_searched_is_an_error_before_any_run(wrong, message):
    values = {"projection": "fastjl", "d": "auto", "threshold": 0.9, "d_max": 8} | wrong
    with pytest.raises(ValueError, match=message):
        searches({key: value for key, value in values.items() if value is not None})


def test_a_share_of_full_training_needs_full_training(recipe):
    recipe.write_text("model: fc\nprojection: fastjl\nd: auto\nfraction: 0.9\nd_max: 8\n")
    with pytest.raises(ValueError, match="`fraction` of `d: auto` needs full training of fc on digits"):
        run.main([str(recipe)])


def test_the_same_search_has_the_same_name():
    values = {"projection": ["fastjl", "dense"], "d": "auto", "threshold": 0.9, "d_max": 8}
    first, second = searches(values)
    assert first.name == searches(values)[0].name
    assert first.name != second.name
    assert not grid(values)


def test_parts_that_come_to_one_search_are_one():
    recipe = {"projection": "fastjl", "d": "auto", "threshold": 0.9, "d_max": 8}
    assert len(searches(recipe | {"runs": [{"lr": 0.3}, {"lr": 0.3}, {"lr": 0.1}]})) == 2


def test_what_belongs_to_a_search_is_an_error_beside_a_grid():
    with pytest.raises(ValueError, match="`seeds` belongs to `d: auto`, got it beside a grid"):
        grid({"projection": "fastjl", "d": 3, "seeds": 5})
    with pytest.raises(ValueError, match="`threshold` belongs to `d: auto`, got it with projection 'full'"):
        grid({"projection": "full", "d": "auto", "threshold": 0.9})
    with pytest.raises(ValueError, match="`d: auto` must stand alone, got d = \\['auto', 5\\]"):
        grid({"projection": "fastjl", "d": ["auto", 5]})


def test_a_search_takes_no_seed(recipe):
    recipe.write_text("model: fc\nprojection: fastjl\nd: auto\nthreshold: 0.9\nd_max: 8\n")
    with pytest.raises(ValueError, match="`d: auto` takes seeds from 0 on, got `seed`"):
        run.main([str(recipe), "--seed", "3"])
    recipe.write_text(recipe.read_text() + "seed: [0, 1]\n")
    with pytest.raises(ValueError, match="`d: auto` takes seeds from 0 on, got `seed`"):
        run.main([str(recipe)])


def test_a_search_and_a_grid_may_share_runs_and_what_is_not_reached_is_said(recipe, capsys):
    recipe.write_text(
        "model: fc\nbatch_size: 128\nepochs: 1\nthreads: 1\nprojection: fastjl\nlr: 0.3\nruns:\n"
        "  - {d: [1, 2], seed: 0}\n  - {d: auto, threshold: 0.99, d_max: 2, max_runs: 3, seeds: 1}\n"
    )
    run.main([str(recipe)])
    printed = capsys.readouterr().out
    assert "| FC | FastJL | 99.00 | none |" in printed
    assert "best seen 0." in printed


def test_a_share_is_of_full_trainings_that_are_alike(recipe):
    recipe.write_text(
        "model: fc\nbatch_size: 128\nepochs: 1\nruns:\n  - {projection: full, lr: [0.1, 0.2]}\n"
        "  - {projection: fastjl, d: auto, fraction: 0.9, d_max: 8}\n"
    )
    with pytest.raises(ValueError, match="full trainings of fc that differ in seed alone, got 2 kinds"):
        run.main([str(recipe)])


def test_the_bar_says_what_is_known_and_counts_on_no_run_that_was_there(monkeypatch, tmp_path):
    (asked,) = searches({"projection": "fastjl", "d": "auto", "threshold": 0.5, "d_max": 64, "seeds": 2})
    bars = []

    def accuracy(settings):
        bars.append(str(bar))
        return float(settings.d >= 6)

    monkeypatch.setattr(search, "Results", lambda output: SimpleNamespace(has=lambda settings: settings.seed < 3))
    monkeypatch.setattr(search, "accuracy", lambda run, kind, output: accuracy(run))
    with tqdm(total=60, bar_format=search.BAR, smoothing=0) as bar:
        found = search.look_for(asked, 0.5, kind.KIND, tmp_path, bar)
        assert (bar.n, bar.initial) == (found.cost.runs, 3)
        bar.total = 100
        assert "runs [" in str(bar)
    assert bars[0].startswith("digits lenet fastjl, d = 1: 0 of at most 60 runs [")
    assert bars[2].startswith("digits lenet fastjl, d = 4: 2 of at most 60 runs [")
    assert bars[2].endswith(", missed up to d = 2]")
    assert bars[4].endswith(", reached from d = 8, missed up to d = 4]")
    assert "at most ? left" in bars[3]
    assert "at most 00:" in bars[4]
    with tqdm(total=60, disable=True) as silent:
        assert search.look_for(asked, 0.5, kind.KIND, tmp_path, silent).d == found.d


def test_a_recorded_search_keeps_its_name():
    folder = Path(run.__file__).parent / "intrinsic_dimension"
    (asked,) = read(folder / "auto.yaml").searches
    assert asked.name == "b66c558fd3d7"
    assert Results(folder).load(asked)["d"] == 185


def test_a_share_of_another_full_training_is_another_search():
    full, part = {"projection": "full", "lr": 0.1}, {"projection": "fastjl", "d": "auto", "fraction": 0.9, "d_max": 8}
    (one,), (same,), (other,), (more,) = (
        searches({"runs": [own, {"projection": "full", "model": "fc"}, part]})
        for own in (full, full, full | {"lr": 0.2}, full | {"seed": [0, 1]})
    )
    assert one.name == same.name
    assert len({one.name, other.name, more.name}) == 3
    assert one.record()["full"] == [Settings(lr=0.1).name]


def test_the_table_names_what_tells_searches_apart(tmp_path):
    common = {"d": "auto", "threshold": 0.9, "d_max": 8}
    part = {"projection": "dense", "lr": 0.1}
    asked = searches(common | {"runs": [{"projection": "fastjl"}, part, part | {"lr": 0.3}, part | {"seeds": 9}]})
    found = {"settings": {}, "goal": 0.9, "d": 3, "interval": [2, 4], "made": [[3, 0]], "seconds": 1.0, "text": ""}
    (tmp_path / "results").mkdir()
    for each in asked:
        (tmp_path / "results" / f"{each.name}.json").write_text(json.dumps(found))
    printed = table.text(asked, Results(tmp_path))
    for name in ("FastJL", "dense, rate 0.1, 5 seeds", "dense, rate 0.3, 5 seeds", "dense, rate 0.1, 9 seeds"):
        assert printed.count(f"| digits | LeNet | {name} | 90.00 | 3 | 2 to 4 |") == 1


def test_a_pretrained_model_is_searched_by_its_test_accuracy(sentences, tmp_path, capsys):
    file = RECIPES / "pretrained" / "sst2_auto.yaml"
    tiny = sentences | {
        "examples": 16,
        "epochs": 1,
        "batch_size": 8,
        "threshold": 0.3,
        "d_max": 8,
        "seeds": 1,
        "max_runs": 3,
    }
    run.main([str(file), *options(tiny, tmp_path)])
    (asked,) = read(file, tiny).searches
    outcome = results(tmp_path)[asked.name]
    made = [results(tmp_path)[asked.run(*point).name] for point in outcome["made"]]
    assert 1 <= len(made) <= 3
    assert all(each["accuracy"]["test"] >= 0.3 for each in made if each["settings"]["d"] >= (outcome["d"] or 9))
    assert outcome["seconds"] == pytest.approx(sum(each["seconds"]["train"]["cpu"] for each in made), abs=0.06)
    assert "| MiniLM-L6 | Kronecker | 30.00 |" in capsys.readouterr().out
    assert (tmp_path / "plots" / "sst2_auto.png").stat().st_size > 10_000


@pytest.mark.parametrize("method", [{"method": "lora", "rank": 8}, {"method": "full"}, {"method": "head"}])
def test_a_method_without_a_d_is_not_searched(method):
    part = method | {"d": "auto", "threshold": 0.8, "d_max": 99}
    with pytest.raises(ValueError, match="`d: auto` needs a run that has a d, got "):
        requests_of(PRETRAINED, part)
