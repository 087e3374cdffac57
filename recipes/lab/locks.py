"""Locks between processes, on any machines that share a folder."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


WAIT = 0.05
"""Seconds between looks at a lock that is waited for."""


class Lock:
    """A folder that is there while a process holds it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def take(self) -> bool:
        """Whether this process now holds it: no living process does.

        The lock names its owner from the moment it appears: a folder is renamed to it, which fails for all processes
        but one, because a folder that is not empty is never replaced.
        """
        if self._abandoned():
            shutil.rmtree(self.folder, ignore_errors=True)
        mine = self._own()
        mine.mkdir(exist_ok=True)
        (mine / "owner").write_text(f"{socket.gethostname()} {os.getpid()}")
        try:
            mine.rename(self.folder)
        except OSError:
            shutil.rmtree(mine)
            return False
        return True

    def release(self) -> None:
        shutil.rmtree(self.folder.rename(self._own()))  # emptied in its place, it could be replaced before it is gone

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        while not self.take():
            time.sleep(WAIT)
        try:
            yield
        finally:
            self.release()

    def _own(self) -> Path:
        return self.folder.with_suffix(f".{socket.gethostname()}.{os.getpid()}")

    def _abandoned(self) -> bool:
        """Whether the owner was a process of this machine that is no more; of other machines nothing is known."""
        try:
            host, pid = (self.folder / "owner").read_text().split()
            if host == socket.gethostname():
                os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except (FileNotFoundError, PermissionError):
            return False
        return False
