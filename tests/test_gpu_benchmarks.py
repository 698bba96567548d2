"""`python -m benchmarks.gpu`: the order of parts, their bounds, going on, failures, and the document's tables."""

import json
import re
import shlex
import time
from pathlib import Path

import pytest
import torch

import benchmarks.gpu
from benchmarks.gpu import MARKED, PARTS, ROOT, Part, filled, main, run_all


def part(code: str, minutes: float = 1.0) -> Part:
    """A part that runs some Python."""
    return Part(minutes, "timeit", "", f"-n1 -r1 {shlex.quote(code)}")


def told(rows: list[dict]) -> dict[str, str]:
    return {row["part"]: row["how"] for row in rows}


def test_parts_run_in_their_order_one_that_fails_stops_none_and_what_is_done_is_not_run_again(tmp_path: Path):
    def append(name: str) -> str:
        return f"open({str(tmp_path / 'order')!r},'a').write({name!r})"

    parts = {"first": part(append("a")), "broken": part(append("b") + ";1/0"), "last": part(append("c"))}
    assert told(run_all(parts, 1, True, tmp_path)) == {"first": "done", "broken": "failed (1)", "last": "done"}
    assert (tmp_path / "order").read_text() == "abc"
    parts = {"new": part(append("d")), **parts}
    parts["last"] = part("1/0")
    assert told(run_all(parts, 1, True, tmp_path))["last"] == "done"
    assert (tmp_path / "order").read_text() == "abcdb"  # what failed comes after what has not been tried


def test_a_part_ends_at_its_bound_the_call_at_its_own_and_the_next_call_goes_on(tmp_path: Path):
    parts = {"long": part("__import__('time').sleep(60)", minutes=0.02), "next": part("0")}
    begun = time.monotonic()
    assert told(run_all(parts, 1, True, tmp_path)) == {"long": "cut short", "next": "done"}
    assert told(run_all({"never": part("0")}, 0, True, tmp_path)) == {"never": "waiting"}
    assert time.monotonic() - begun < 50
    assert told(run_all({**parts, "long": part("0")}, 1, True, tmp_path))["long"] == "done"


def test_the_document_has_a_table_of_what_was_measured_and_says_what_was_not(tmp_path: Path):
    rows = [{"length": 8, "ours": 1.0}]
    (tmp_path / "rotary-cuda.json").write_text(json.dumps({"hardware": "a GPU", "rows": rows}))
    text = "a\n<!-- benchmark: rotary -->\nold\n<!-- end -->\n<!-- benchmark: decode -->\n<!-- end -->\nb\n"
    made = filled(text, tmp_path)
    assert "<!-- benchmark: rotary -->\na GPU:\n\n| length | ours |\n| --- | --- |\n| 8 | 1.00 |\n<!-- end -->" in made
    assert "<!-- benchmark: decode -->\nnot measured\n<!-- end -->\nb\n" in made
    document = (ROOT / "docs" / "performance.md").read_text()
    assert filled(document) == document


def test_without_a_gpu_nothing_is_recorded_as_done(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--results", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main()
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_text_of_the_study_is_handed_on(tmp_path: Path, monkeypatch):
    ran: dict[str, Part] = {}
    monkeypatch.setattr("sys.argv", ["gpu", "--results", str(tmp_path), "--paths", '["a b/**/*.py"]'])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmarks.gpu, "run_all", lambda parts, *_: ran.update(parts) or [])
    main()
    assert list(ran) == list(PARTS)
    assert shlex.split(ran["study"].options)[-2:] == ["--paths", '["a b/**/*.py"]']


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path: Path):
    rows = run_all(PARTS, 10, True, tmp_path)
    assert set(told(rows).values()) == {"done"}, rows
    written = {path.name for path in tmp_path.glob("*-cpu.json")}
    tables = set(MARKED.findall((ROOT / "docs" / "performance.md").read_text())) - {"launches"}  # no toy
    size = re.compile("-(bfloat16|float32|124M|demo|cpu)")
    assert {size.sub("", name) for name in written} == {size.sub("", f"{name}.json") for name in tables}
