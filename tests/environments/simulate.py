"""Makes environments whose installed metadata equals an image's, without gigabytes of code; real pip works in
them.

The fixtures hold the images' own versions and requirement lines: `image-*.json` cut down to the packages that
matter here, `image-*-complete.json.gz` all of them.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(__file__).with_name("fixtures")
COLAB_PIP = "24.1.2"


def load_image(name: str, **overlay: dict) -> dict:
    """name → {"version", "requires"}; `overlay` replaces or adds packages, None takes one out."""
    path = FIXTURES / name
    image = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    image |= {key.replace("_", "-"): value for key, value in overlay.items()}
    return {key: value for key, value in image.items() if value}


def find_python(version: str) -> str:
    """An interpreter of this version: ours, one on the PATH, or one that pyenv keeps."""
    if sys.version.startswith(version + "."):
        return sys._base_executable
    kept = sorted(
        Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv").glob(f"versions/{version}.*/bin/python")
    )
    for candidate in (shutil.which(f"python{version}"), *map(str, kept)):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    raise AssertionError(f"Python {version} is needed: put python{version} on the PATH")


def make_environment(folder: Path, template: str, packages: dict) -> str:
    """A venv with pip and packaging copied from the template's site-packages, and these as metadata alone.

    Returns its interpreter. Copying takes 0.3 s where installing pip again would take 5.
    """
    base = subprocess.check_output(
        [template, "-c", "import sys; print(sys._base_executable)"], text=True
    ).strip()
    subprocess.run([base, "-m", "venv", "--without-pip", str(folder)], check=True)
    python, source = str(folder / "bin" / "python"), find_site(template)
    for item in source.iterdir():
        if item.name.split("-")[0] in ("pip", "packaging"):
            shutil.copytree(item, find_site(python) / item.name)
    for name, package in packages.items():
        if name not in ("pip", "packaging"):
            write_metadata(find_site(python), name, package["version"], package["requires"])
    return python


def find_site(python: str) -> Path:
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.check_output(command, text=True).strip())


def metadata_text(name: str, version: str, requires: list[str]) -> str:
    return "\n".join(
        [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {r}" for r in requires),
            "",
        ]
    )


def write_metadata(site: Path, name: str, version: str, requires: list[str]) -> None:
    """An installed distribution that has no modules."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(metadata_text(name, version, requires))
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text(
        "".join(f"{info.name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD"))
    )


def make_wheel(
    folder: Path, name: str, version: str, requires: list[str] = (), files: dict[str, str] | None = None
) -> None:
    """A wheel that pip installs like any other; `files` are its modules."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    contents = {
        **(files or {}),
        f"{stem}.dist-info/METADATA": metadata_text(name, version, requires),
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: simulate\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*contents, f"{stem}.dist-info/RECORD"])
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in {**contents, f"{stem}.dist-info/RECORD": record}.items():
            wheel.writestr(path, text)


def link_modules(python: str, source: Path, modules: Path, without: set[str]) -> None:
    """Let the environment import another one's modules without seeing its metadata: pip cannot touch
    those.
    """
    modules.mkdir()
    for item in source.iterdir():
        name = item.name.split(".")[0]
        if not item.name.endswith((".dist-info", ".pth")) and name not in {
            "pip",
            "packaging",
            "__pycache__",
            *without,
        }:
            (modules / item.name).symlink_to(item)
    (find_site(python) / "modules.pth").write_text(f"{modules}\n")


def run(python: str, *arguments: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    """Run the environment's Python with our package in reach; stdout and stderr as text."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
    return subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        env=variables,
        cwd=Path(python).parent,
        timeout=300,
    )


def doctor(python: str, *options: str, environment: dict | None = None) -> tuple[int, dict, str]:
    """`python -m dpo_helpers doctor --json`: exit code, the JSON, and what a person would have read."""
    process = run(python, "-m", "dpo_helpers", "doctor", "--json", *options, environment=environment)
    assert process.stdout, process.stderr
    return process.returncode, json.loads(process.stdout), process.stderr


def set_up(python: str, requirements: tuple[str, ...] = (), environment: dict | None = None) -> str:
    """What the notebook's set-up cell does; returns what it prints."""
    code = f"from dpo_helpers.setup.packages import install_missing; install_missing({requirements!r})"
    process = run(python, "-c", code, environment=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def versions(python: str) -> dict[str, str]:
    """name → version as pip sees them."""
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json").stdout)
    return {item["name"].lower().replace("_", "-").replace(".", "-"): item["version"] for item in listed}


def pip_check(python: str) -> set[str]:
    """The complaints of `pip check`: an opinion that is not ours."""
    return {
        line
        for line in run(python, "-m", "pip", "check").stdout.splitlines()
        if " requires " in line or " has requirement " in line
    }


def difference(before: dict, after: dict) -> dict:
    """name → (old, new) of what differs."""
    return {
        n: (before.get(n), after.get(n)) for n in sorted({*before, *after}) if before.get(n) != after.get(n)
    }
