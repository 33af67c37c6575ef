import subprocess

import pytest
from simulate import COLAB_PIP, find_python, make_environment


@pytest.fixture(scope="session")
def get_template(tmp_path_factory):
    """A venv with nothing but pip and packaging, made once for each (Python, pip)."""
    made = {}

    def get(python: str = "3.11", pip: str = COLAB_PIP) -> str:
        if (python, pip) not in made:
            folder = tmp_path_factory.mktemp(f"template-{python}-{pip}")
            subprocess.run([find_python(python), "-m", "venv", str(folder)], check=True)
            made[python, pip] = str(folder / "bin" / "python")
            wanted = "pip" if pip == "newest" else f"pip=={pip}"
            command = [
                made[python, pip],
                "-m",
                "pip",
                "install",
                "--quiet",
                "--upgrade",
                wanted,
                "packaging==26.3",
            ]
            subprocess.run(command, check=True)
        return made[python, pip]

    return get


@pytest.fixture(scope="session")
def make(get_template, tmp_path_factory):
    """make(packages, python=, pip=) → the interpreter of a fresh simulated environment."""

    def make_one(packages: dict, **template) -> str:
        return make_environment(
            tmp_path_factory.mktemp("environment") / "venv", get_template(**template), packages
        )

    return make_one
