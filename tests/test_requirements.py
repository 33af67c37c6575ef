import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from dpo_helpers.setup.packages import REQUIREMENTS

ROOT = Path(__file__).parent.parent
# Colab's GPU image of 2026-08-19; trl, matplotlib-fontja and sacrebleu are not on it
COLAB = {
    "torch": "2.11.0",
    "transformers": "5.15.0",
    "peft": "0.20.0",
    "datasets": "4.0.0",
    "accelerate": "1.14.0",
    "huggingface-hub": "1.27.0",
    "tokenizers": "0.22.2",
    "matplotlib": "3.10.0",
    "ipywidgets": "7.7.1",
    "pandas": "2.2.3",
    "psutil": "5.9.5",
    "packaging": "26.3",
    "numpy": "2.1.3",
    "scipy": "1.16.3",
    "filelock": "3.32.3",
    "pyarrow": "18.1.0",
    "openpyxl": "3.1.5",
    "tqdm": "4.67.3",
}
NOT_ON_COLAB = {"trl", "matplotlib-fontja", "sacrebleu"}


def read(name):
    lines = (ROOT / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[_.]", "-", requirement.name.lower()): requirement for requirement in requirements}


def test_every_range_holds_colabs_version_so_that_installing_there_moves_nothing():
    ranges = read("requirements.txt")
    assert set(ranges) == set(COLAB) | NOT_ON_COLAB
    assert [name for name, version in COLAB.items() if version not in ranges[name].specifier] == []


def test_both_sets_of_tested_versions_lie_in_the_ranges():
    ranges = read("requirements.txt")
    for name in ("constraints.txt", "constraints-colab.txt"):
        tested = {
            package: str(requirement.specifier).removeprefix("==")
            for package, requirement in read(name).items()
        }
        assert [
            package
            for package in ranges
            if package in tested and tested[package] not in ranges[package].specifier
        ] == []
        assert name == "constraints-colab.txt" or set(ranges) <= set(tested)


def test_the_low_end_is_colabs():
    tested = {
        package: str(requirement.specifier) for package, requirement in read("constraints-colab.txt").items()
    }
    assert {name: tested[name] for name in COLAB} == {name: f"=={v}" for name, v in COLAB.items()}
    assert tested["trl"] == "==0.29.1" and Version(tested["torchao"][2:]) >= Version("0.16")


def test_set_up_asks_for_nothing_that_the_requirements_do_not_list():
    ranges = read("requirements.txt")
    for line in REQUIREMENTS:
        assert re.sub(r"[_.]", "-", Requirement(line).name) in ranges
    assert str(ranges["trl"].specifier) == str(Requirement("trl>=0.29.1,<2").specifier)
    assert "trl>=0.29.1,<2" in REQUIREMENTS


def test_only_packages_that_are_declared_are_imported():
    known = {name.replace("-", "_") for name in read("requirements.txt")} | {
        "dpo_helpers",
        "google",
        "IPython",
        "pip",
    }
    import sys

    imported = set()
    for path in (ROOT / "dpo_helpers").glob("*.py"):
        imported |= {
            match.group(1)
            for match in re.finditer(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        }
    assert imported - known - set(sys.stdlib_module_names) == set()
