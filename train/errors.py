"""How does a user learn what went wrong? In one line on stderr, without a traceback."""

import dis
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser

CHECKOUT = Path(__file__).parents[1]
INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
OURS = tuple(f"{CHECKOUT / name}{os.sep}" for name in ("train", "study", "xpos_zoo"))
REFUSE = ("lightning", "jsonargparse")  # what else checks options, and has errors of any type for them


class UserError(ValueError):
    """A wrong input: the message names what is wrong and what would be right."""


def is_refusal(error: Exception) -> bool:
    """Whether we, Lightning or jsonargparse raised the error on purpose, or memory or a file failed.

    What passes through a user's own code, such as a callback, is an error of that code: its traceback says where.
    """
    if isinstance(error, UserError | ArgumentError):
        return True
    calls, call = [], error.__traceback__
    while call is not None:
        calls.append(call)
        call = call.tb_next
    files = [call.tb_frame.f_code.co_filename for call in calls]
    if not all(file.startswith((*INSTALLED, *OURS)) or not Path(file).is_absolute() for file in files):
        return False
    if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return True
    on_purpose = dis.opname[calls[-1].tb_frame.f_code.co_code[calls[-1].tb_lasti]] == "RAISE_VARARGS"
    by_others = any(f"{os.sep}{package}{os.sep}" in files[-1] for package in REFUSE)
    return on_purpose and not isinstance(error, AssertionError) and (by_others or isinstance(error, ValueError))


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the process with one line and status 2 for what a user can mend.

    An interruption ends it with 130. A closed pipe, such as that of `head`, ends it without a word.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it closes stdout
        sys.exit(1)
    except Exception as error:
        if not is_refusal(error):
            raise
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
