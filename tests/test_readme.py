"""The README's examples run as printed."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_examples_run_one_after_the_other():
    names = {}
    for example in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)
    assert {"attention", "cache", "model", "q", "k"} <= names.keys()


def test_every_file_that_it_names_is_there():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / path).exists(), path
    for path in re.findall(r"\b(configs/\w+\.yaml)", README):
        assert (Path(__file__).parents[1] / path).exists(), path
