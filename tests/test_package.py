"""What the wheel holds, what importing the library loads, and what its files import."""

import email
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "xpos_zoo").rglob("*.py"))


def loaded_by(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys; {statement}; print(*sys.modules)"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (wheel,) = (zipfile.ZipFile(path) for path in tmp_path.iterdir())
    information = f"xpos_zoo-{PROJECT['version']}.dist-info"
    library = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {name for name in wheel.namelist() if not name.startswith(information)} == library | {"xpos_zoo/py.typed"}
    assert wheel.read(f"{information}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = email.message_from_bytes(wheel.read(f"{information}/METADATA"))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[<>=~! ]", line)[0] for line in required} == {"torch", "einops"}


def test_the_version_is_that_of_the_citation_and_of_the_newest_changes():
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall("^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


def test_the_workflow_tests_every_python_and_torch_that_the_project_supports():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    pythons, torches = (
        re.findall(r"\d[\d.]*", line) for line in re.findall(r"^ +(?:python|torch): \[.*", workflow, re.M)
    )
    classifiers = {line for line in PROJECT["classifiers"] if line.startswith("Programming Language")}
    assert {f"Programming Language :: Python :: {python}" for python in pythons} == classifiers
    least, above = re.findall(r"torch>=2\.(\d+),<2\.(\d+)", PROJECT["dependencies"][0])[0]
    assert [int(torch.split(".")[1]) for torch in torches] == list(range(int(least), int(above)))


@pytest.mark.slow
def test_importing_the_library_loads_torch_and_einops_alone():
    before, after = loaded_by("import torch, einops"), loaded_by("import torch, einops, xpos_zoo")
    packages = {name.partition(".")[0] for name in after - before}
    assert packages <= {"xpos_zoo", *sys.stdlib_module_names, "torch", "einops"}
    compiler = ("torch._dynamo", "torch._inductor")
    assert not {name for name in after - before if name.startswith(compiler)}


def test_files_import_torch_einops_and_the_standard_library_alone():
    for source in SOURCES:
        optional = {"pretrained": {"safetensors"}, "hf": {"transformers"}}.get(
            source.stem, set()
        )  # loaded by none above
        packages = set(re.findall(r"^ *(?:from|import) (\w+)", source.read_text(), re.MULTILINE))
        assert packages <= {"xpos_zoo", "torch", "einops"} | sys.stdlib_module_names | optional, source
