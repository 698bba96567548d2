"""How does a user learn what went wrong? In one line on stderr, without a traceback."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException


class UserError(ValueError):
    """A wrong input: the message names what is wrong and what would be right."""


@contextmanager
def errors_in_one_line(*more: type[Exception]) -> Iterator[None]:
    """End the process with one line and status 2 for what a user can mend, and for the types in `more`.

    An interruption ends it with 130. A closed pipe, such as that of `head`, ends it without a word.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it closes stdout
        sys.exit(1)
    except (UserError, ArgumentError, MisconfigurationException, OSError, *more) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        sys.exit(130)


def command(work: Callable[..., Any], args: list[str] | None = None) -> None:
    """Call `work` with the command line `args`, by default this process's.

    Its parameters are the options, its docstring their help, that of its module the command's; `runs` comes first.
    """
    module = sys.modules[work.__module__]
    assert module.__spec__ is not None
    parser = ArgumentParser(prog=f"python -m {module.__spec__.name}", description=module.__doc__, exit_on_error=False)
    positional: set[str | int] = {name for name in signature(work).parameters if name == "runs"}
    if positional:
        parser.add_argument("runs", nargs="+", help="folders of runs, or folders that contain them")
    parser.add_function_arguments(work, skip=positional)
    with errors_in_one_line():
        work(**parser.parse_args(args).as_dict())
