"""Recording in a Trainer, of trajectories and spectra: at which steps, and what a resumed training does."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from subspace_peft import Spectra, SpectraCallback, SubspaceConfig, Trajectory, TrajectoryCallback
from tests.models import MLP


# without an accelerator the loader warns that it was told to pin memory
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


class Regression(nn.Module):
    """MLP with the outputs that Trainer needs; it learns to be constant."""

    def __init__(self):
        super().__init__()
        self.net = MLP()

    def forward(self, x, labels=None):
        out = self.net(x)
        return {"loss": (out - 1).square().mean(), "logits": out}


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def trainer(folder, *callbacks, adapted=False, **kwargs):
    """Eight steps, two an epoch, with a checkpoint after every second step."""
    torch.manual_seed(0)
    data = [{"x": torch.randn(6), "labels": torch.zeros(())} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=4, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2,
        report_to=[], use_cpu=True, seed=0, **{"disable_tqdm": True, **kwargs},
    )  # fmt: skip
    model = Regression()
    if adapted:
        model = get_peft_model(model, SubspaceConfig(d=20, target_modules=["fc1"]))
    return Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))


@pytest.mark.parametrize("every", [0, "step", 1.5, True])
def test_a_bad_interval(every, tmp_path):
    with pytest.raises(ValueError, match="`every` must be 'epoch' or a number of steps of at least 1, got"):
        TrajectoryCallback(tmp_path, every=every)


def test_one_progress_line(tmp_path, capsys):
    trainer(tmp_path, TrajectoryCallback(tmp_path / "quiet"), save_strategy="no").train()
    assert "trajectory" not in capsys.readouterr().err
    trainer(tmp_path, TrajectoryCallback(tmp_path / "samples"), save_strategy="no", disable_tqdm=False).train()
    assert "trajectory: 100%" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize(
    ("every", "initial", "steps"),
    [("epoch", True, [0, 2, 4, 6, 8]), ("epoch", False, [2, 4, 6, 8]), (3, True, [0, 3, 6])],
    ids=str,
)
def test_a_trajectory(every, initial, steps, tmp_path):
    recorder = TrajectoryCallback(tmp_path / "samples", every=every, initial=initial)
    run = trainer(tmp_path / "run", recorder, save_strategy="no")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    trajectory = Trajectory(tmp_path / "samples")
    assert trajectory.steps == steps
    if initial:
        assert all(torch.equal(before[name], tensor) for name, tensor in trajectory.sample(0).items())
    if steps[-1] == 8:
        last = trajectory.sample(-1)
        assert last.keys() == before.keys()
        assert all(torch.equal(p, last[name]) for name, p in run.model.named_parameters())
    P = torch.cat([t.view(-1, 2) for t in trajectory.basis(2).values()]).double()
    torch.testing.assert_close(P.T @ P, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-5)


def test_an_interrupted_trajectory_goes_on(tmp_path):
    trainer(tmp_path / "straight", TrajectoryCallback(tmp_path / "one", every=1)).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "halves", TrajectoryCallback(tmp_path / "two", every=1), Interrupt()).train()
    one, two = Trajectory(tmp_path / "one"), Trajectory(tmp_path / "two")
    assert two.steps == [0, 1, 2, 3, 4, 5]
    two.add(Regression(), 7)  # later than the checkpoint of step 4, so the training that resumes must delete it
    resumed = trainer(tmp_path / "halves", TrajectoryCallback(tmp_path / "two", every=1))
    with pytest.raises(ValueError, match=r"must be recorded in a folder without samples, .* holds 7; resume that"):
        resumed.train()
    steps = []
    resumed.add_callback(type("Look", (TrainerCallback,), {"on_train_begin": lambda *a, **k: steps.append(two.steps)}))
    resumed.train(resume_from_checkpoint=True)
    assert steps == [[0, 1, 2, 3, 4]]
    assert two.steps == one.steps == list(range(9))
    for i in range(9):
        for name, tensor in one.sample(i).items():
            assert torch.equal(two.sample(i)[name], tensor), (i, name)


class StopAtFive(TrainerCallback):
    """As at a time limit: saves, and stops within an epoch."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == 5


def test_an_end_within_an_epoch_is_no_end_of_one_once_the_training_goes_on(tmp_path):
    folder = tmp_path / "samples"
    trainer(tmp_path / "run", TrajectoryCallback(folder), StopAtFive()).train()
    assert Trajectory(folder).steps == [0, 2, 4, 5]
    trainer(tmp_path / "run", TrajectoryCallback(folder)).train(resume_from_checkpoint=True)
    assert Trajectory(folder).steps == [0, 2, 4, 6, 8]


def test_the_end_of_a_training_within_an_epoch_stays(tmp_path):
    folder = tmp_path / "samples"
    for resume in (False, True):
        trainer(tmp_path / "run", TrajectoryCallback(folder), max_steps=5).train(resume_from_checkpoint=resume)
        assert Trajectory(folder).steps[:4] == [0, 2, 4, 5]  # Trainer makes one more step of a training that has ended


class Small(Regression):
    """Runs out of memory with more than two samples, after its third call."""

    calls = 0

    def forward(self, x, labels=None):
        self.calls += 1
        if len(x) > 2 and self.calls > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().forward(x, labels)


@pytest.mark.parametrize("kind", ["trajectory", "spectra"])
def test_smaller_batches_are_recorded_from_the_start(kind, tmp_path):
    spectra = Spectra(rank=2)
    recorder = (
        TrajectoryCallback(tmp_path / "a", every=1) if kind == "trajectory" else SpectraCallback(spectra, every=1)
    )
    run = trainer(tmp_path / "run", recorder, save_strategy="no", auto_find_batch_size=True, max_steps=4)
    run.model = run.model_wrapped = Small()
    run.train()
    assert run.state.train_batch_size == 2
    assert recorder.recorded() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="must be recorded in"):
        run.train()


# ------------------------------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_spectra(adapted, tmp_path):
    spectra = Spectra(rank=2, names=r".*fc\d.weight", reference=3)
    run = trainer(tmp_path, SpectraCallback(spectra), adapted=adapted)
    run.train()
    assert spectra.steps == [0, 2, 3, 4, 6, 8]
    assert spectra.weights == ["net.fc1.weight", "net.fc2.weight"]
    plain = run.model.merge_and_unload() if adapted else run.model
    expected = torch.linalg.svdvals(plain.net.fc1.weight).double()
    torch.testing.assert_close(spectra.singular_values("net.fc1.weight")[-1], expected, atol=1e-5, rtol=1e-9)
    left = spectra.angles("net.fc1.weight", "left", "top")
    assert left[:2].isnan().all()
    assert (left[2] < 1e-12).all()
    assert (left[-1] > 1e-5).all()
    with pytest.raises(ValueError, match=r"in an empty Spectra, this one holds 6 steps \(folder: None\); resume"):
        run.train()


def test_interrupted_spectra_go_on(tmp_path):
    one, two = (Spectra(rank=2, folder=tmp_path / name) for name in ("one", "two"))
    trainer(tmp_path / "straight", SpectraCallback(one, every=1)).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "halves", SpectraCallback(two, every=1), Interrupt()).train()
    one, two = (Spectra(rank=2, folder=tmp_path / name) for name in ("one", "two"))
    assert two.steps == [0, 1, 2, 3, 4, 5]  # the checkpoint is of step 4
    trainer(tmp_path / "halves", SpectraCallback(two, every=1)).train(resume_from_checkpoint=True)
    assert two.steps == one.steps == list(range(9))
    for name in one.weights:
        assert torch.equal(one.singular_values(name), two.singular_values(name))
        assert torch.equal(one.vector_angles(name, "left"), two.vector_angles(name, "left"))
        assert torch.equal(one.angles(name, "right", "top"), two.angles(name, "right", "top"))
