"""What keeps two processes from one run."""

import os
import socket
import subprocess

from recipes.lab.results import Results
from recipes.training.settings import Settings


def test_a_lock_holds_while_its_owner_lives(tmp_path):
    settings, runs = Settings(), Results(tmp_path)
    assert runs.take(settings)
    assert not runs.take(settings)
    owner = tmp_path / "results" / f"{settings.name}.lock" / "owner"
    owner.write_text("another-machine 1")
    assert not runs.take(settings)
    ended = subprocess.Popen(["true"])
    ended.wait()
    owner.write_text(f"{socket.gethostname()} {ended.pid}")
    assert runs.take(settings)
    assert owner.read_text().split()[1] == str(os.getpid())
    runs.release(settings)
    assert list((tmp_path / "results").iterdir()) == []
