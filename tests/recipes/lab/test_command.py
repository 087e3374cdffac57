"""What a user got wrong is said in one sentence, with exit status 2 and without a traceback."""

import re

import pytest

from recipes import run
from recipes.lab import command
from tests.recipes.files import written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{recipe}", "--epoch", "3"], "A setting must be one that the recipe knows, got `epoch`; near: epochs"),
        (["{recipe}", "--d", "few"], "`d` must be of type int, got 'few'."),
        (["{recipe}", "--d"], "`--d` must be given a value."),
        (["{recipe}", "3"], "A value must follow the name of a setting, --<setting>, got '3'."),
        (["{recipe}", "--workers", "0"], "`--workers` must be at least 1, got 0."),
        (["{recipe}", "--workers", "some"], "argument --workers: invalid int value: 'some'"),
        (["{recipe}", "--executor", "cluster"], "`--executor` must be one of processes, dask, slurm, or"),
        (["{recipe}", "--report"], "A report needs results, tiny.yaml has none in"),
        (["{folder}/none.yaml"], "A recipe must be a file, got '{folder}/none.yaml': No such file or directory."),
        (["{folder}"], "A recipe must be a file, got '{folder}': Is a directory."),
        (["{folder}/broken.yaml"], "A recipe must be YAML, '{folder}/broken.yaml' is not: while parsing"),
        (["{folder}/list.yaml"], "A recipe must be a mapping of settings, and its `runs` a list of such"),
        (["{folder}/kind.yaml"], "`kind` must name a module of recipes/ that has KIND, got 'cooking'."),
        (["{folder}/report.yaml"], "`report` must name a module of recipes/ that has text, got 3."),
        (["{folder}/word.yaml"], "A setting must be one that the recipe knows, got `learning_rate`"),
        (["{recipe}", "--output", "{recipe}"], "`--output` must be a folder, got '{recipe}': File exists."),
        (
            ["{recipe}", "--data", "/nowhere", "--dataset", "mnist"],
            "`data` must be a folder with train.parquet, or a Hub",
        ),
        (
            ["{folder}/auto.yaml"],
            "`batch_size` must be between 1 and the 1437 training images, got 5000. The",
        ),
        ([], "the following arguments are required: file"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_with_exit_status_2(recipe, arguments, said, capsys):
    folder = recipe.parent
    written(folder / "broken.yaml", "d: [3")
    written(folder / "list.yaml", "- 3")
    written(folder / "kind.yaml", "kind: cooking")
    written(folder / "report.yaml", "report: 3")
    written(
        folder / "auto.yaml",
        "model: fc",
        "projection: fastjl",
        "d: auto",
        "threshold: 0.9",
        "d_max: 8",
        "batch_size: 5000",
    )
    written(folder / "word.yaml", "learning_rate: 3")
    words = [word.format(recipe=recipe, folder=folder) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: run.main(words))
    assert ended.value.code == 2
    printed = capsys.readouterr().err.strip()
    assert said.format(folder=folder, recipe=recipe) in printed
    lines = [re.sub(r"\x1b\[[A-Z]", "", line).strip() for line in printed.splitlines()]  # bars move the cursor
    assert len([line for line in lines if line and not re.search(r"epoch/s|runs \[", line)]) == 1
    assert not list(folder.glob("results/*.json"))


def test_a_fault_of_the_code_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"):
        command.run(lambda: int("x"))
    with pytest.raises(KeyError):
        command.run(lambda: {}["x"])


def test_a_command_that_is_stopped_says_how_to_go_on(capsys):
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        command.run(stop)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Stopped: the same command does what is missing.\n"
