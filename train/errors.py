"""What a user can mend is told in one line."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import signature
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

UNKNOWN_OPTION = re.compile(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)")


class UserError(ValueError):
    """A wrong input: its message names what is wrong and what would be right."""


def explained(error: ArgumentError, parser: ArgumentParser) -> UserError:
    """The error, and what would be right where jsonargparse does not say so."""
    message = str(error)
    if unknown := UNKNOWN_OPTION.search(message):
        nearest = get_close_matches(unknown[1], [action.dest for action in parser._actions], n=1)
        message += f"; did you mean {nearest[0]}?" if nearest else "; --help lists what there is"
    elif "Option 'scale_base' is not accepted" in message:
        message = "model.positions takes no scale_base; give it as model.scale_base"
    elif 'key "model.positions"' in message:
        message = f"{message.rstrip('.')}; right are XPOS, RotaryEmbedding, or the import path of a class"
    elif "Unexpected config" in message:
        message += "; a configuration file holds a mapping: data: ..., model: ..., trainer: ..."
    elif message.endswith("Got value: None"):
        message += "; it has no default, so set it in YAML or on the command line"
    return UserError(message)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and exit status 2, an interruption into 130.

    A reader that has had enough, such as `head`, ends the program without a word.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it closes stdout
        sys.exit(1)
    except (UserError, ArgumentError, MisconfigurationException, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        sys.exit(130)


def command(work: Callable[..., Any], args: list[str] | None) -> None:
    """Call `work` with the command line `args`, by default this process's, and tell its errors in one line.

    Its parameters are the options, its docstring their help, that of its module the command's; `runs` comes first.
    """
    module = sys.modules[work.__module__]
    assert module.__spec__ is not None
    parser = ArgumentParser(prog=f"python -m {module.__spec__.name}", description=module.__doc__, exit_on_error=False)
    positional: set[str | int] = {name for name in signature(work).parameters if name == "runs"}
    if positional:
        parser.add_argument("runs", nargs="+", help="folders of runs, or folders that contain them")
    parser.add_function_arguments(work, skip=positional)
    with told_in_one_line():
        try:
            options = parser.parse_args(args)
        except ArgumentError as error:
            raise explained(error, parser) from error
        work(**options.as_dict())
