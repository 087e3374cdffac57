"""One JSON a run, JSON Lines a recipe, one reader for both."""

import json

import pytest

from recipes import run
from recipes.lab.grid import read
from recipes.lab.results import Results, as_line, compact, read_lines, read_measurement, write_measurement
from recipes.lab.sweep import Sweep
from recipes.training.settings import Settings
from tests.recipes.files import RECIPE_FILES, written


RUNS = [Settings(model="fc", seed=seed) for seed in range(5)]


def finished(results: Results, runs: list[Settings]) -> dict[str, dict]:
    for one in runs:
        assert results.take(one)
        results.write(one, {"final_accuracy": 0.1 + one.seed / 3, "words": "θ → 90 %"})
        results.release(one)
    return {one.name: results.load(one) for one in runs}


def test_compacting_loses_nothing(tmp_path):
    results = Results(tmp_path)
    before = finished(results, RUNS)
    assert compact(results, RUNS[:3], tmp_path / "a.jsonl") == 3
    assert compact(results, RUNS[2:], tmp_path / "b.jsonl") == 2
    assert {one.name: Results(tmp_path).load(one) for one in RUNS} == before
    assert {one.name: results.load(one) for one in RUNS} == before
    assert not (tmp_path / "results").exists()
    names = [name for name, _ in read_lines(tmp_path / "a.jsonl")]
    assert names == sorted(one.name for one in RUNS[:3])


def test_compacting_again_adds_and_sorts(tmp_path):
    results = Results(tmp_path)
    before = finished(results, RUNS[3:])
    compact(results, RUNS, tmp_path / "a.jsonl")
    before |= finished(results, RUNS[:3])
    compact(results, RUNS, tmp_path / "a.jsonl")
    assert dict(read_lines(tmp_path / "a.jsonl")) == before
    assert list(before) != sorted(before)
    text = (tmp_path / "a.jsonl").read_text()
    assert text == "".join(as_line(name, before[name]) for name in sorted(before))
    assert compact(results, RUNS, tmp_path / "a.jsonl") == 0
    assert (tmp_path / "a.jsonl").read_text() == text


def test_a_run_that_is_made_again_takes_the_place_of_its_line_wherever_it_is(tmp_path):
    results = Results(tmp_path)
    finished(results, RUNS[:2])
    compact(results, RUNS[:1], tmp_path / "a.jsonl")
    compact(results, RUNS[1:], tmp_path / "b.jsonl")
    for one in RUNS[:2]:
        assert results.take(one)
        results.write(one, {"final_accuracy": 0.9})
        results.release(one)
    assert compact(results, RUNS, tmp_path / "b.jsonl") == 2
    for file, one in zip("ab", RUNS, strict=False):
        assert read_lines(tmp_path / f"{file}.jsonl") == [(one.name, results.load(one))]
        assert results.load(one)["final_accuracy"] == 0.9


def test_runs_of_another_recipe_stay_where_they_are(tmp_path):
    results = Results(tmp_path)
    finished(results, RUNS)
    compact(results, RUNS[:2], tmp_path / "a.jsonl")
    assert {path.stem for path in (tmp_path / "results").iterdir()} == {one.name for one in RUNS[2:]}


def test_the_command_compacts_and_what_is_compacted_is_not_run_again(tmp_path, capsys):
    recipe = written(
        tmp_path / "tiny.yaml", "model: fc", "epochs: 1", "images: 256", "projection: fastjl", "d: [2, 3]"
    )
    run.main([str(recipe)])
    before = Results(tmp_path).records(read(recipe).runs)
    run.main([str(recipe), "--compact"])
    assert "2 results moved to" in capsys.readouterr().out
    assert Results(tmp_path).records(read(recipe).runs) == before
    run.main([str(recipe)])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[]"])
def test_a_damaged_line_is_named(tmp_path, text):
    written(tmp_path / "a.jsonl", '{"name": "b"}', text)
    with pytest.raises(ValueError, match=r"Line 2 of '.*a\.jsonl' must be a result in JSON with a `name`"):
        Results(tmp_path).load(RUNS[0])


@pytest.mark.parametrize("text", ["{}", "[]"])
def test_a_result_without_its_settings_is_no_result(tmp_path, text):
    results = Results(tmp_path)
    results.folder.mkdir()
    written(results.path(RUNS[0]), text)
    with pytest.raises(ValueError, match="A result must hold its `settings`, that of fc full seed=0 does not; delete"):
        results.load(RUNS[0])
    results.path(RUNS[0]).unlink()
    written(tmp_path / "a.jsonl", '{"name": "' + RUNS[0].name + '"}')
    with pytest.raises(ValueError, match="A result must hold its `settings`"):
        results.load(RUNS[0])


def test_a_measurement_is_one_line_and_says_what_it_was_made_with(tmp_path):
    file = tmp_path / "folder" / "step.jsonl"
    write_measurement(file, {"ms": [1.5, 2.5]})
    write_measurement(file, {"ms": [3.5]})
    assert read_measurement(file)["ms"] == [3.5]
    assert read_measurement(file).keys() == {"ms", "versions", "hardware", "commit"}
    assert json.loads(file.read_text())["name"] == "step"
    with pytest.raises(ValueError, match="A measurement must be there to be reported, .*other.jsonl' is not"):
        read_measurement(tmp_path / "other.jsonl")


def test_every_committed_line_is_a_run_of_its_recipe_or_of_its_search():
    """Names are hashes: a change of settings or defaults would lose results that took days."""
    for folder in sorted({file.parent for file in RECIPE_FILES}):
        results, known = Results(folder), set()
        for file in folder.glob("*.yaml"):
            if "- timm/" in file.read_text():
                continue
            recipe = read(file)
            sweep = Sweep(recipe.kind, recipe.runs, folder)
            known |= {each.name for each in [*sweep.runs, *recipe.searches]}
            for search in recipe.searches:
                known |= {search.run(d, seed).name for d, seed in results.load(search).get("made", ())}
        for file in folder.glob("*.yaml"):
            lines = folder / f"{file.stem}.jsonl"
            lost = {name for name, _ in read_lines(lines)} - known if lines.exists() else set()
            assert not lost, f"{lines} holds results that no run asks for"
