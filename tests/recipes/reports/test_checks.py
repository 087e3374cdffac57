"""What a report cannot show is refused before anything is trained."""

import pytest

from recipes.lab.grid import read
from recipes.reports import compression, low_rank, optimisers, phases
from recipes.reports.conclude import check
from tests.recipes.files import RECIPE_FILES, runs


@pytest.mark.parametrize("file", RECIPE_FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_recipe_can_be_shown(file):
    if "- timm/" not in file.read_text():
        check(read(file))


@pytest.mark.parametrize("report", [phases, compression])
def test_full_trainings_of_one_network_are_of_one_kind(report):
    with pytest.raises(ValueError, match="Full trainings of one network must differ in seed alone, got several `lr`"):
        report.check(runs({"model": "fc", "lr": [0.1, 0.2]}))


def test_a_table_of_rates_shows_rates_batches_and_seeds():
    rates = {"model": "fc", "lr": [0.1, 0.2, 0.3], "seed": [0, 1], "batch_size": [64, 128], "epochs": 1}
    optimisers.check(runs(rates))
    with pytest.raises(ValueError, match="A table of rates needs runs of adam .* got several `epochs`; leave one"):
        optimisers.check(runs(rates | {"epochs": [1, 2]}))
    optimisers.check(runs(rates | {"epochs": [1, 2], "lr": 0.1}))


def test_low_rank_training_is_compared_with_normal_training_alone():
    low_rank.check(runs({"model": "mlp", "runs": [{}, {"projection": "identity", "rank": 2}]}))
    with pytest.raises(ValueError, match="A report of low-rank training shows full training and runs with a `rank`"):
        low_rank.check(runs({"model": "mlp", "projection": "fastjl", "d": 5}))
