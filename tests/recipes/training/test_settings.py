import pytest

from recipes.lab.grid import read
from recipes.run import parse
from recipes.training.settings import Settings
from tests.recipes.files import runs as grid


def test_names_are_fixed_and_come_from_what_differs_from_the_defaults():
    """Results under version control are found by these names: a new setting, or another folder, must not move them."""
    run = Settings(dataset="mnist", projection="fastfood", d=200, lr=0.5, epochs=5, schedule="cosine")
    assert run.name == "167b6d424cc5"
    assert Settings(**run.record(), data="elsewhere", threads=3, save_adapter=True).name == run.name


def test_a_trajectory_shares_data_and_network_with_the_run_and_is_named_by_its_own_settings():
    recipe = {"model": "fc", "seed": 3, "projection": "basis", "d": 2, "samples": 4, "trajectory": {"epochs": [4, 5]}}
    runs = grid(recipe)
    assert [run.trajectory for run in runs] == [Settings(model="fc", seed=3, epochs=epochs) for epochs in (4, 5)]
    assert runs[0].name == "bef6744f9bec"
    assert Settings(**runs[0].record()).name == runs[0].name
    (changed,) = grid(recipe, {"trajectory.epochs": "6"})
    assert changed.trajectory.epochs == 6


def test_a_run_of_the_recipe_and_the_same_as_a_trajectory_are_one():
    sgd = {"optimizer": "sgd", "lr": 0.1, "epochs": 4}
    basis = {"projection": "basis", "d": 2, "samples": 3, "optimizer": "pbfgs", "trajectory": sgd, "batch_size": 64}
    full, follower = grid({"batch_size": 256, "seed": 1, "runs": [sgd, basis]})
    assert follower.trajectory == full
    assert (full.batch_size, follower.batch_size) == (256, 64)


def test_full_training_has_no_subspace():
    assert Settings(projection="full", d=7, normalization="rows") == Settings()


def test_the_inner_width_of_factors_belongs_to_the_identity():
    run = Settings(model="mlp", projection="identity", rank=20, d=5, start="orthogonal")
    assert run == Settings(model="mlp", projection="identity", rank=20, start="orthogonal")
    assert Settings(projection="identity", start="random") == Settings(projection="identity")
    assert Settings(rank=20, start="random") == Settings()
    assert str(run) == "mlp identity rank=20 seed=0"
    with pytest.raises(ValueError, match="`rank` belongs to projection 'identity', .* got 'fastjl'"):
        Settings(projection="fastjl", d=5, rank=2)
    with pytest.raises(ValueError, match="`rank` must be at least 1, or 0 .*, got -1"):
        Settings(projection="identity", rank=-1)
    with pytest.raises(ValueError, match="`start` must be one of svd, orthogonal, random, got 'zero'"):
        Settings(projection="identity", rank=2, start="zero")


def test_a_list_is_an_axis_and_a_sub_grid_wins_over_what_is_shared():
    recipe = {"seed": [0, 1], "lr": "1e-3", "runs": [{"lr": 0.1}, {"projection": ["dense", "fastjl"], "d": [3, 4]}]}
    runs = grid(recipe)
    assert [str(run) for run in runs[:5]] == [
        "lenet full seed=0",
        "lenet dense d=3 seed=0",
        "lenet dense d=4 seed=0",
        "lenet fastjl d=3 seed=0",
        "lenet fastjl d=4 seed=0",
    ]
    assert {run.seed for run in runs[5:]} == {1}
    assert [run.lr for run in runs[:2]] == [0.1, 0.001]


def test_the_command_line_wins_and_a_run_stands_once(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: [0, 1, 2]\nruns:\n  - {d: 5}\n  - {d: [1, 2]}\n")
    order = parse(
        [str(file), "--seed", "3", "--lr", "0.1", "0.2", "--save_adapter", "true", "--d", "4", "--projection", "dense"]
    )
    runs = read(order.file, order.overrides).runs
    assert order.output == tmp_path
    assert [(run.seed, run.lr, run.save_adapter) for run in runs] == [(3, 0.1, True), (3, 0.2, True)]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"learning_rate": 1}, "got `learning_rate`"),
        ({"runs": [{"epoch": 1}]}, "got `epoch`; near: epochs"),
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"lr": -1}, "`lr` must be above 0, got -1.0"),
        ({"lr": "inf"}, "`lr` must be a finite number, got inf"),
        ({"optimizer": "sgd", "momentum": -1}, "`momentum` must be at least 0, got -1.0"),
        ({"weight_decay": -1}, "`weight_decay` must be at least 0, got -1.0"),
        ({"threads": -1}, "`threads` must be at least 0, got -1"),
        ({"images": -1}, "`images` must be at least 0, got -1"),
        ({"seed": -1}, "`seed` must be from 0 to 2"),
        ({"seed": 10**20}, "`seed` must be from 0 to 2"),
        ({"normalization": "foo"}, "`normalization` must be one of rows, columns, got 'foo'"),
        ({"burn_in": -1}, "`burn_in` must be at least 0, got -1"),
        ({"trajectory": 3}, "`trajectory` must be a mapping of settings, got 3"),
        ({"epochs": []}, "`epochs` must have a value, got an empty list"),
        ({"epochs": 1.5}, "`epochs` must be of type int, got 1.5"),
        ({"save_adapter": "perhaps"}, "`save_adapter` must be of type bool, got 'perhaps'"),
        ({"model": "lenett"}, "`model` must be one of fc, lenet, .* or timm/<name>, got 'lenett'"),
        ({"projection": "fastfoot"}, "`projection` must be one of full, .*fastfood.*, got 'fastfoot'"),
        ({"projection": "dense"}, "`d` must be at least 1 for projection 'dense', got 0"),
        ({"momentum": 0.9}, "`momentum` belongs to optimizer 'sgd', got 'adam'"),
        ({"optimizer": "pbfgs"}, "`optimizer` 'pbfgs' trains theta_d; give a `projection`, got 'full'"),
        (
            {"optimizer": "pplusbfgs", "projection": "dense", "d": 2, "save_adapter": True},
            "`save_adapter` must be false with 'pplusbfgs'",
        ),
        ({"projection": "basis", "d": 2}, "`trajectory` must be given for projection 'basis'"),
        (
            {"projection": "basis", "d": 4, "samples": 3, "trajectory": {"epochs": 5}},
            "`samples` must be at least d = 4, got 3; give more `samples`",
        ),
        (
            {"projection": "basis", "d": 4, "samples": 6, "trajectory": {"epochs": 5}},
            "`samples` must be at most the 5 epochs of the trajectory, got 6",
        ),
        ({"trajectory": {"seed": 1}}, "got `trajectory.seed`"),
    ],
)
def test_what_no_run_could_do_is_an_error_before_any_run(recipe, message):
    with pytest.raises(ValueError, match=message):
        grid(recipe)


@pytest.mark.parametrize("text", ["", "- {d: 3}", "runs: {projection: full}"])
def test_a_file_that_is_no_recipe(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="A recipe must be a mapping of settings, and its `runs` a list"):
        read(path)


def test_an_unknown_option_is_an_error(tmp_path):
    (tmp_path / "recipe.yaml").write_text("d: 3\n")
    with pytest.raises(ValueError, match="got `epoch`; near: epochs"):
        parse([str(tmp_path / "recipe.yaml"), "--epoch", "3"])


def test_another_projection_leaves_full_training_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: fc\nruns:\n  - {projection: full, lr: 0.5}\n  - {projection: [fastfood, sparse], d: 5}\n")
    runs = read(path, {"projection": ["fastjl"], "seed": ["4"]}).runs
    assert [(run.projection, run.lr, run.seed) for run in runs] == [("full", 0.5, 4), ("fastjl", Settings.lr, 4)]
    assert {run.projection for run in read(path, {"projection": ["full"]}).runs} == {"full"}
