"""The file of a search: it goes on from there, and leaves the file of anything else alone."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from subspace_peft.measure import RunError
from tests.measure.cases import Flaky, entries, find, step, with_threads


@pytest.mark.parametrize("n", [1, 5, 14, 20])
def test_a_search_goes_on_from_its_file_and_repeats_no_run(n, tmp_path):
    file, flaky = tmp_path / "search.jsonl", Flaky(n)
    with pytest.raises(RunError, match="finished runs are kept in .*search.jsonl', with which the same call goes on"):
        find(flaky, d_max=1000, file=file)
    assert len(file.read_text().splitlines()) == n
    result, whole = find(flaky, d_max=1000, file=file), find(step(187), d_max=1000)
    assert len(flaky.calls) == result.cost.runs + 1
    assert flaky.calls[n - 1] == flaky.calls[n]
    assert len(set(flaky.calls)) == result.cost.runs
    pd.testing.assert_frame_equal(result.runs.drop(columns="seconds"), whole.runs.drop(columns="seconds"))
    assert (result.d, result.interval) == (whole.d, whole.interval)


def test_a_search_that_ended_makes_no_run_and_goes_on_for_a_finer_resolution(tmp_path):
    file = tmp_path / "search.jsonl"
    first = find(step(187), d_max=1000, file=str(file))
    again = find(Flaky(1), d_max=1000, file=file)
    pd.testing.assert_frame_equal(first.runs, again.runs)
    fine = find(step(187), d_max=1000, file=file, resolution=0)
    assert fine.interval == (187, 187)
    pd.testing.assert_frame_equal(fine.runs[: first.cost.runs], first.runs)


def test_numbers_of_numpy_and_empty_lines(tmp_path):
    file = tmp_path / "search.jsonl"
    first = find(step(187), d_max=np.int64(1000), probability=np.float32(0.5), threshold=np.float32(0.5), file=file)
    with open(file, "a") as lines:
        lines.write("\n")
    again = find(Flaky(1), d_max=1000, probability=0.5, threshold=0.5, file=file)
    pd.testing.assert_frame_equal(again.runs, first.runs)


def test_runs_without_a_number_are_in_the_file(tmp_path):
    file, train = tmp_path / "search.jsonl", lambda d, seed: math.nan if d < 8 else 1.0
    first = find(train, d_max=100, file=file)
    assert all(json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines())
    pd.testing.assert_frame_equal(find(train, d_max=100, file=file).runs, first.runs)


def test_half_a_line_of_a_process_that_was_killed_is_taken_off(tmp_path):
    file = tmp_path / "search.jsonl"
    first = find(step(187), d_max=1000, file=file)
    whole = file.read_bytes()
    for cut in (3, len(whole) - 1, len(whole) - 20, 40):
        file.write_bytes(whole[:cut])
        again = find(step(187), d_max=1000, file=file)
        pd.testing.assert_frame_equal(again.runs.drop(columns="seconds"), first.runs.drop(columns="seconds"))
        assert len(file.read_bytes().splitlines()) == len(whole.splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.6}, "`file` must be of a search with `threshold` 0.6, .* is of one with 0.5; give another"),
        ({"d_max": 999}, "`file` must be of a search with `d_max` 999, .* is of one with 1000"),
        ({"d_min": 2}, "`file` must be of a search with `d_min` 2"),
        ({"probability": 0.9}, "`file` must be of a search with `probability` 0.9"),
        ({"larger_is_better": False}, "`file` must be of a search with `larger_is_better` False"),
    ],
)
def test_the_file_of_another_search_is_an_error(options, message, tmp_path):
    file, flaky = tmp_path / "search.jsonl", Flaky(1)
    find(step(187), d_max=1000, file=file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        find(flaky, **{"d_max": 1000, "file": file} | options)
    assert not flaky.calls
    assert file.read_bytes() == before


def test_the_file_of_another_version_is_an_error(tmp_path):
    file = tmp_path / "search.jsonl"
    find(step(187), d_max=1000, file=file)
    file.write_text(file.read_text().replace('"subspace_peft.measure": 1', '"subspace_peft.measure": 2'))
    with pytest.raises(ValueError, match=r"`file` must be of version 1, .* is of version 2; give another `file`, or"):
        find(step(187), d_max=1000, file=file)


@pytest.mark.parametrize(
    ("text", "line"),
    [("notes of mine", 1), ("notes of mine\n", 1), ('{"d": 1}\n', 1), ("[1, 2]\n", 1), ("{header}5\n", 2),
     ('{header}{"d": 1}\n', 2), ('{header}{"d": 1, "seed": 0, "metric": 0.1, "seconds": 1}\n?\n', 3)],
)  # fmt: skip
def test_a_file_that_is_no_search_is_an_error_and_left_alone(text, line, tmp_path):
    file = tmp_path / "search.jsonl"
    find(step(1), d_max=1000, file=file)
    header = file.read_text().splitlines(keepends=True)[0]
    file.write_text(text.replace("{header}", header))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"`file` must be that of a search, line {line} of .* is not"):
        find(step(1), d_max=1000, file=file)
    assert file.read_bytes() == before


def test_a_folder_that_is_not_there_is_an_error_before_any_run(tmp_path):
    flaky = Flaky(1)
    with pytest.raises(FileNotFoundError):
        find(flaky, d_max=10, file=tmp_path / "nowhere" / "search.jsonl")
    assert not flaky.calls


def test_a_file_that_two_processes_wrote_is_an_error(tmp_path):
    file = tmp_path / "search.jsonl"
    find(step(5), d_max=20, file=file)
    header, *runs = file.read_text().splitlines()
    file.write_text("\n".join([header, *runs, *runs]) + "\n")
    with pytest.raises(ValueError, match="two processes wrote to it at once"):
        find(step(5), d_max=20, file=file)


# ---------------------------------------------------------------------------------------------- several runs at a time


def test_proposals_are_in_the_file_before_their_runs(tmp_path):
    file = tmp_path / "search.jsonl"
    result = with_threads(step(187), file=file)
    proposed = set()
    for entry in entries(file):
        if "metric" in entry:
            assert (entry["d"], entry["seed"]) in proposed
        else:
            proposed.add((entry["d"], entry["seed"]))
    assert proposed == set(zip(result.runs.d, result.runs.seed, strict=True))


@pytest.mark.parametrize("workers", [1, 4])
def test_a_search_that_was_killed_makes_the_runs_that_were_under_way_and_repeats_none(workers, tmp_path):
    file = tmp_path / "search.jsonl"
    with_threads(step(187), file=file)
    text = file.read_text().splitlines()
    file.write_text("\n".join(text[: len(text) // 2]) + "\n")
    before = entries(file)
    finished = {(entry["d"], entry["seed"]) for entry in before if "metric" in entry}
    under_way = {(entry["d"], entry["seed"]) for entry in before} - finished
    assert under_way
    again = Flaky(0)
    result = with_threads(again, file=file, workers=workers)
    assert under_way == set(again.calls[: len(under_way)])
    assert not finished & set(again.calls)
    assert result.runs.seed.tolist() == list(range(result.cost.runs))
    assert result.cost.runs == len(finished) + len(again.calls)
    assert result.interval[0] <= 187 <= result.interval[1]


@pytest.mark.parametrize("line", ['{"d": 1, "seed": 0}', '{"d": 2, "seed": 0}', '{"d": 2, "seed": 99}'])
def test_proposals_of_two_processes_in_one_file_are_an_error(line, tmp_path):
    file = tmp_path / "search.jsonl"
    with_threads(step(187), file=file)
    with open(file, "a") as appended:
        appended.write(line + "\n")
    with pytest.raises(ValueError, match="two processes wrote to it at once"):
        with_threads(step(187), file=file)
