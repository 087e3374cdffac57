"""Low-rank training: which layers become factors, the table of accuracies and the costs, small."""

import json

import pytest
from torch import nn

from recipes.lab.results import Results, read_measurement
from recipes.low_rank_training import cost
from recipes.reports import low_rank
from recipes.run import main
from recipes.tasks.models import build
from recipes.training import train
from recipes.training.settings import Settings
from tests.recipes.files import runs as grid


RECIPE = {"seed": [0, 1], "model": "fc", "dataset": ["mnist", "usps"]}
RECIPE |= {"runs": [{}, {"projection": "identity", "rank": [4, 2]}]}


def trained(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("rank", "count"), [(20, 1_668_000), (2, 1_596_000), (1, 1_592_000)])
def test_counts_of_the_slide(rank, count):
    for dataset in ("mnist", "usps"):
        settings = Settings(dataset=dataset, model="mlp", projection="identity", rank=rank, start="orthogonal")
        model = train.wrap(build("mlp", dataset), settings)
        assert sum(trained(model).values()) == count
        assert 4_000 * rank == model.peft_config["default"].D


def test_the_layers_between_others_are_factors_and_the_rest_is_whole():
    network = build("fc", "digits")
    whole = train.factored(network, Settings(model="fc", projection="identity", rank=3))
    assert (whole["target_modules"], whole["modules_to_save"]) == (["3"], ["1", "5"])
    model = train.wrap(network, Settings(model="fc", projection="identity", rank=3))
    assert sorted(trained(model).values()) == [10, 32, 192, 320, 2048]
    with pytest.raises(ValueError, match="`rank` needs a linear layer .* 'cnn' has 1; take another"):
        train.wrap(build("cnn", "digits"), Settings(model="cnn", projection="identity", rank=3))


def finish(results, run, accuracy):
    results.take(run)
    counts = {"D": 64, "d": 10 + run.rank, "final_accuracy": accuracy}
    results.write(run, {**counts, "epochs": [{"train_loss": 0.1}], "seconds": {"train": 2.0}})
    results.release(run)


def test_the_average_is_over_data_sets_of_each_seed(tmp_path):
    runs, results = grid(RECIPE), Results(tmp_path / "results")
    assert low_rank.table(runs, results).empty
    for run in runs:
        accuracy = {"mnist": 0.9, "usps": 0.8}[run.dataset] + 0.02 * run.seed - 0.01 * run.rank
        if (run.rank, run.seed, run.dataset) != (2, 1, "usps"):
            finish(results, run, accuracy)
    printed = low_rank.text(runs, results)
    normal, _, narrow = (line.split(" | ", 4)[4] for line in printed.splitlines()[-3:])
    assert normal == "91.00 ± 1.41 (2 s) | 81.00 ± 1.41 (2 s) | 86.00 ± 1.41 (2 s) |  |"
    assert narrow == "89.00 ± 1.41 (2 s) | 78.00 (2 s) | 83.00 (2 s) | -2.00 |"
    assert low_rank.plot(runs, results, tmp_path / "plots" / "mlp.png").stat().st_size > 10_000


def test_a_product_trains_and_its_adapter_gives_the_same_outputs(tmp_path, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "report: low_rank\nmodel: fc\nepochs: 3\nlr: 0.01\nbatch_size: 32\nthreads: 1\nsave_adapter: true\n"
        "runs:\n  - {}\n  - {projection: identity, rank: 6, start: [svd, orthogonal, random]}\n"
    )
    main([str(recipe)])
    printed = capsys.readouterr().out
    assert printed.count("reloaded adapter: outputs equal") == 3
    assert "| low rank, orthogonal start | 6 | 2,794 |" in printed
    accuracies = [json.loads(file.read_text())["final_accuracy"] for file in (tmp_path / "results").glob("*.json")]
    assert len(accuracies) == 4
    assert min(accuracies) > 0.7


def test_costs(tmp_path, capsys):
    options = ["--model", "fc", "--dataset", "digits", "--rank", "3", "--steps", "2"]
    cost.main([*options, "--output", str(tmp_path)])
    normal, adapter, plain = read_measurement(tmp_path / "cost.jsonl")["methods"]
    first, hidden, last = 64 * 32, 32 * 32, 32 * 10
    assert normal["flops"] == 2 * 128 * (2 * first + 3 * hidden + 3 * last)  # no gradient with respect to the images
    assert adapter["flops"] == plain["flops"] == 2 * 128 * (2 * first + 3 * (64 * 3) + 3 * last)
    assert normal["trained"] == 3_466
    assert plain["trained"] == adapter["trained"] + 32  # with the bias of the hidden layer, which P does not move
    assert normal["held_mib"] == pytest.approx(3 * 3_466 * 4 / cost.MIB, abs=0.006)  # weights and two moments
    activations = 128 * (2 * 32 + 10) * 4 / cost.MIB
    assert normal["held_mib"] + activations < normal["peak_mib"] < 4 * (normal["held_mib"] + activations)
    printed = capsys.readouterr().out
    assert "| compressed | 3 |" in printed
    cost.main(["--report", "--output", str(tmp_path)])
    assert printed.endswith(capsys.readouterr().out)
