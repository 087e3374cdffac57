"""The command line: what a user got wrong is said in one sentence, with exit status 2 and without a traceback."""

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

from recipes.lab.grid import check_keys
from subspace_peft.measure import RunError


ROOT = Path(__file__).resolve().parents[2]
OURS = (str(ROOT / "recipes"), str(ROOT / "subspace_peft"))


class Parser(argparse.ArgumentParser):
    """ArgumentParser without abbreviated options, with the module's text as it stands and one-sentence errors."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help tells the rest.\n")


def settings(words: list[str], keys: Collection[str]) -> dict[str, list[str]]:
    """`--<key> value [value ...]`, by key.

    Raises:
        ValueError: if a key is unknown, or has no value.
    """
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            check_keys([key], keys)
            values = given[key] = [value] if equals else []
        elif values is None:
            raise ValueError(f"A value must follow the name of a setting, --<setting>, got {word!r}.")
        else:
            values.append(word)
    for key, values in given.items():
        if not values:
            raise ValueError(f"`--{key}` must be given a value.")
    return given


def run(main: Callable[[], None]) -> None:
    """Runs a command. SIGTERM ends it as Ctrl-C does, so that locks and helpers go."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        print("Stopped: the same command does what is missing.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not is_refusal(error):
            raise
        print(error, file=sys.stderr)
        sys.exit(2)


def is_refusal(error: Exception) -> bool:
    """Whether our code refused a value, rather than failed."""
    if isinstance(error, RunError) and isinstance(error.__cause__, Exception):
        return is_refusal(error.__cause__)
    if not isinstance(error, (ValueError, OSError, ImportError)):
        return False
    if hasattr(error, "refusal"):
        return error.refusal
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and str(Path(frames[-1].filename).resolve()).startswith(OURS)
