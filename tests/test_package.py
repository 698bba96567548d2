"""What the wheel and the sdist hold and run, what importing the library loads, and what its files import."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "xpos_zoo").rglob("*.py"))
OPTIONAL = {"pretrained": {"safetensors"}, "hf": {"transformers"}}  # modules, and what they alone need


def loaded_by(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys; {statement}; print(*sys.modules)"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(built):
    wheel = zipfile.ZipFile(built["wheel"])
    information = f"xpos_zoo-{PROJECT['version']}.dist-info"
    library = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {name for name in wheel.namelist() if not name.startswith(information)} == library | {"xpos_zoo/py.typed"}
    assert wheel.read(f"{information}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = email.message_from_bytes(wheel.read(f"{information}/METADATA"))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[<>=~! ]", line)[0] for line in required} == {"torch", "einops"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_installed_into_an_empty_folder_runs_the_readme(kind, built, tmp_path):
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "installed")]
    pip = [sys.executable, "-m", "pip", "install", *options, str(built[kind])]
    subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True, check=True)
    (example, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    modules = [f"xpos_zoo.{path.stem}" for path in SOURCES if path.stem not in ("__init__", *OPTIONAL)]
    script = f"{example}\nimport xpos_zoo, {', '.join(modules)}\nprint(xpos_zoo.__file__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}  # found before an editable install
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()) == tmp_path / "installed" / "xpos_zoo" / "__init__.py"


@pytest.mark.slow
def test_the_sdist_holds_what_its_tests_read(built, tmp_path):
    with tarfile.open(built["sdist"]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    parts = ["tests", "configs", "examples", "models", ".github"]
    files = [path.relative_to(ROOT) for part in parts for path in (ROOT / part).rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix != ".pyc" and not (folder / path).exists()]
    assert (folder / ".pre-commit-config.yaml").exists()
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "tests/test_package.py"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


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
        packages = set(re.findall(r"^ *(?:from|import) (\w+)", source.read_text(), re.MULTILINE))
        allowed = {"xpos_zoo", "torch", "einops"} | sys.stdlib_module_names | OPTIONAL.get(source.stem, set())
        assert packages <= allowed, source
