"""What a user can mend is told in one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import ArgumentError


class UserError(ValueError):
    """A wrong input: its message names what is wrong and what would be right."""


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn a `UserError`, or a configuration that does not parse, into one line on stderr and exit status 2."""
    try:
        yield
    except (UserError, ArgumentError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
