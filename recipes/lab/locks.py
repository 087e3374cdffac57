"""Locks between processes, on any machines that share a folder."""

import contextlib
import os
import shutil
import socket
from pathlib import Path


class Lock:
    """A folder that is there while a process holds it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def take(self) -> bool:
        """Whether this process now holds it: no living process does.

        The lock names its owner from the moment it appears: a folder is renamed to it, which fails for all processes
        but one, because a folder that is not empty is never replaced.
        """
        self.drop_abandoned()
        draft = self._draft()
        draft.mkdir(parents=True, exist_ok=True)
        (draft / "owner").write_text(f"{socket.gethostname()} {os.getpid()}")
        try:
            draft.rename(self.folder)
        except OSError:
            shutil.rmtree(draft)
            return False
        return True

    def held(self) -> bool:
        """Whether a process holds it, unless its owner is known to have ended."""
        return self.folder.exists() and not self._abandoned()

    def drop_abandoned(self) -> None:
        """Remove it if its owner is no more; of several processes that try, one renames it and the others do not."""
        if self._abandoned():
            with contextlib.suppress(OSError):
                shutil.rmtree(self.folder.rename(self._draft()))

    def release(self) -> None:
        # renamed first: emptied in its place, the folder could be replaced before it is gone
        shutil.rmtree(self.folder.rename(self._draft()))

    def _draft(self) -> Path:
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
