"""The scripts that measure: one command line, one sentence for a bad call, and results that are read back."""

import shutil
import signal
from importlib import import_module
from pathlib import Path

import pytest

from recipes import run
from recipes.lab import command
from recipes.lab.results import read_measurement


RECIPES = Path(run.__file__).parent
MAIN = '\n\nif __name__ == "__main__":\n    command.run(main)\n'
YAML = {  # the first argument of scripts that need one
    "run": "deep_linear/depth.yaml",
    "dldr.reconstruction": "dldr/lenet5.yaml",
    "lottery.spectra": "lottery/mnist.yaml",
    "vit_lora.cost": "vit_lora/mnist.yaml",
}
SCRIPTS = [
    ".".join(file.relative_to(RECIPES).with_suffix("").parts)
    for file in sorted(RECIPES.rglob("*.py"))
    if "__main__" in file.read_text(encoding="utf-8")
]
MEASUREMENTS = {
    "class_gradient.coverage": "coverage",
    "dldr.reconstruction": "lenet5.reconstruction",
    "lottery.spectra": "spectra_mnist",
    "low_rank_training.cost": "cost",
    **{
        f"speed.{name}": name
        for name in ["distortion", "layer", "models", "optimiser", "pca", "projections", "setup", "step", "sweeps"]
    },
    **{f"theory.{name}": name for name in ["affine", "dimensions", "linearized", "wells"]},
    "vit_lora.cost": "costs_mnist",
}
NOT_MEASURED = ["speed.gpu"]
"""Those without a committed result: nobody has run them so far."""


@pytest.fixture
def refusal(capsys):
    """What a call says that ends with exit status 2."""

    def call(script: str, *arguments: str) -> str:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                command.run(lambda: import_module(f"recipes.{script}").main(list(arguments)))
        finally:
            signal.signal(signal.SIGTERM, before)
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert len(printed.err.splitlines()) == 1
        assert "| --- |" not in printed.out
        return printed.err

    return call


def yaml(script: str) -> list[str]:
    return [str(RECIPES / YAML[script])] if script in YAML else []


def test_all_scripts_are_known():
    assert sorted({*MEASUREMENTS, *NOT_MEASURED, "run"}) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_errors_of_a_script_go_through_the_command(script):
    assert (RECIPES / f"{script.replace('.', '/')}.py").read_text(encoding="utf-8").endswith(MAIN)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_one_sentence(script, refusal):
    assert "nonsense" in refusal(script, *yaml(script), "--nonsense", "1")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_report_without_a_result_is_one_sentence(script, refusal, tmp_path):
    said = refusal(script, *yaml(script), "--report", "--output", str(tmp_path / "empty"))
    assert "make" in said
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("script", sorted(YAML))
def test_a_wrong_yaml_is_one_sentence(script, refusal, tmp_path):
    assert "No such file" in refusal(script, str(tmp_path / "missing.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "must be a mapping" in refusal(script, str(tmp_path / "list.yaml"))
    (tmp_path / "damaged.yaml").write_text("a: [1\n")
    assert "must be YAML" in refusal(script, str(tmp_path / "damaged.yaml"))
    if script != "run":
        said = refusal(script, str(RECIPES / "deep_linear" / "completion.yaml"))
        assert "The recipe must have runs of kind" in said
        assert "'deep_linear.completion'" in said


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("speed.step", ["--rounds", "0"], "argument --rounds: must be an integer of at least 1, got '0'"),
        ("speed.setup", ["--threads", "two"], "argument --threads: must be an integer of at least 0, got 'two'"),
        ("speed.projections", ["--rounds", "nan"], "argument --rounds: must be a number above 0, got 'nan'"),
        ("speed.sweeps", ["--whole", "basis"], "argument --whole: invalid choice: 'basis'"),
        ("speed.optimiser", ["--network", "nothing"], "`model` must be one of"),
        ("theory.wells", ["--D", "-1"], "argument --D: must be an integer of at least 2, got '-1'"),
        ("theory.linearized", ["--dataset", "nothing"], "argument --dataset: invalid choice: 'nothing'"),
        ("class_gradient.coverage", ["--lr", "0"], "argument --lr: must be a number above 0, got '0'"),
        ("low_rank_training.cost", ["--model", "nothing"], "`model` must be one of"),
        ("theory.affine", ["--output", __file__], "argument --output: must be a folder, got the file"),
    ],
)
def test_a_bad_value_is_one_sentence(script, arguments, message, refusal, tmp_path):
    output = [] if "--output" in arguments else ["--output", str(tmp_path)]
    assert message in refusal(script, *arguments, *output)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", sorted(MEASUREMENTS))
def test_the_committed_result_is_read_and_reported(script, tmp_path, capsys):
    folder = RECIPES / script.split(".")[0]
    file = folder / f"{MEASUREMENTS[script]}.jsonl"
    assert {"versions", "hardware", "commit"} <= set(read_measurement(file))
    for results in folder.glob("*.jsonl"):  # figures show runs of the recipe too
        shutil.copy(results, tmp_path)
    import_module(f"recipes.{script}").main([*yaml(script), "--report", "--output", str(tmp_path)])
    assert "| --- |" in capsys.readouterr().out
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert not list(folder.glob("results/*.json"))


def test_a_damaged_result_is_one_sentence(refusal, tmp_path):
    (tmp_path / "wells.jsonl").write_text("{}\n")
    assert "must be a result in JSON with a `name`" in refusal("theory.wells", "--report", "--output", str(tmp_path))
