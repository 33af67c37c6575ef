"""What people and interrupted pips do to an image, and the images to do it to."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

from simulate import ROOT, find_site, load_image, pip_check, run, versions, write_metadata

COMPLETE, IMAGE = "image-2026-08-19-complete.json.gz", "image-2026-08-19.json"


def pip(python: str, *arguments: str) -> None:
    process = run(python, "-m", "pip", *arguments)
    assert process.returncode == 0, process.stdout + process.stderr


def replace_metadata(python: str, name: str, version: str, requires: list[str]) -> None:
    """Another version of a package that is too large, or too old for this Python, to be really installed."""
    for old in find_site(python).glob(f"{name.replace('-', '_')}-*.dist-info"):
        shutil.rmtree(old)
    write_metadata(find_site(python), name, version, requires)


def install_tqdm(python: str) -> Path:
    """tqdm with its files, in the version that is there; returns its folder of metadata."""
    pip(python, "install", "--no-deps", "--force-reinstall", f"tqdm=={versions(python)['tqdm']}")
    return next(find_site(python).glob("tqdm-*.dist-info"))


def upgrade_everything(python: str) -> None:
    pip(python, "install", "--upgrade", "transformers", "trl", "peft")


def install_an_old_trl(python: str) -> None:
    pip(python, "install", "trl==0.12.0")


def install_an_old_trio(python: str) -> None:
    pip(python, "install", "transformers==4.46.3", "trl==0.12.0", "peft==0.13.2")


def move_fsspec_ahead(python: str) -> None:
    pip(python, "install", "fsspec==2025.9.0")


def move_fsspec_ahead_with_gcsfs(python: str) -> None:
    pip(python, "install", "fsspec==2025.9.0", "gcsfs==2025.9.0")


def move_fsspec_back(python: str) -> None:
    pip(python, "install", "fsspec==2024.6.1")


def move_numpy_back(python: str) -> None:
    replace_metadata(python, "numpy", "1.26.4", [])


def uninstall_half(python: str) -> None:
    install_tqdm(python)
    shutil.rmtree(find_site(python) / "tqdm")


def uninstall_half_and_the_metadata(python: str) -> None:
    (install_tqdm(python) / "METADATA").unlink()
    shutil.rmtree(find_site(python) / "tqdm")


def lose_record(python: str) -> None:
    (install_tqdm(python) / "RECORD").unlink()


def lose_a_file(python: str) -> None:
    install_tqdm(python)
    (find_site(python) / "tqdm" / "std.py").unlink()


def leave_tilde_folders(python: str) -> None:
    """Beside the good ones: what pip had set aside of an older version, with its metadata."""
    info = install_tqdm(python)
    shutil.copytree(info, info.with_name("~qdm-4.1.0.dist-info"))
    metadata = info.with_name("~qdm-4.1.0.dist-info") / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: tqdm\nVersion: 4.1.0\n")
    shutil.copytree(find_site(python) / "tqdm", find_site(python) / "~qdm")


def stop_pip_between(python: str) -> None:
    """The old tqdm set aside and the new one not there yet; fsspec without its RECORD, the old one as `~`."""
    info = install_tqdm(python)
    info.rename(info.with_name(f"~{info.name[1:]}"))
    (find_site(python) / "tqdm").rename(find_site(python) / "~qdm")
    old = next(find_site(python).glob("fsspec-*.dist-info"))
    old.rename(old.with_name(f"~{old.name[1:]}"))
    pip(python, "install", "--no-deps", f"fsspec=={old.name.split('-')[1].removesuffix('.dist')}")
    (next(find_site(python).glob("fsspec-*.dist-info")) / "RECORD").unlink()


def replace_torch(python: str) -> None:
    replace_metadata(python, "torch", "2.6.0+cu118", ["filelock", "fsspec", "jinja2", "networkx"])


def damage_packaging(python: str) -> None:
    """packaging, which the doctor needs itself."""
    pip(python, "install", "--no-deps", "--force-reinstall", f"packaging=={versions(python)['packaging']}")
    (find_site(python) / "packaging" / "version.py").unlink()


CURABLE = (
    upgrade_everything,
    install_an_old_trl,
    install_an_old_trio,
    move_fsspec_ahead,
    move_fsspec_ahead_with_gcsfs,
    move_fsspec_back,
    move_numpy_back,
    uninstall_half,
    uninstall_half_and_the_metadata,
    lose_record,
    lose_a_file,
    leave_tilde_folders,
    stop_pip_between,
    damage_packaging,
)


def make_images() -> dict[str, tuple[dict, str, str]]:
    """name → (packages, Python, pip): Colab's two, an older one of 2026, one with an extra in the way."""
    spring, nvcc = load_image(IMAGE, torchao=None), load_image(IMAGE)
    older = {"transformers": "5.5.0", "peft": "0.18.1", "torch": "2.10.0+cu128", "torchvision": "0.25.0"}
    older |= {"pandas": "2.2.2", "numpy": "2.0.2", "accelerate": "1.12.0", "huggingface-hub": "1.16.0"}
    for name, version in older.items():
        spring[name]["version"] = version
    for package in spring.values():
        lines = (line.replace("torch==2.11.0", "torch==2.10.0") for line in package["requires"])
        package["requires"] = [line.replace("pandas==2.2.3", "pandas==2.2.2") for line in lines]
    toolkit = ["nvidia-cuda-nvcc-cu12==12.8.93 ; extra == 'nvcc'"]
    nvcc["cuda-toolkit"] = {"version": "12.8.1", "requires": toolkit}
    nvcc["nvidia-cuda-nvcc-cu12"] = {"version": "12.9.86", "requires": []}
    nvcc["user-of-both"] = {"version": "1.0", "requires": ["cuda-toolkit[nvcc]", "fsspec>=2024"]}
    return {
        "2025-06-26": (load_image("image-2025-06-26.json"), "3.11", "24.1.2"),
        "2026-08-19": (load_image(COMPLETE), "3.13", "24.1.2"),
        "spring 2026": (spring, "3.12", "24.1.2"),
        "2026-08-19, nvcc": (nvcc, "3.13", "newest"),
    }


def copy_environment(python: str, folder: Path) -> str:
    shutil.copytree(Path(python).parents[1], folder, symlinks=True)
    return str(folder / "bin" / "python")


def serve_silence() -> tuple[str, socket.socket]:
    """The address of a package index that takes every connection and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def accept() -> None:
        while True:
            try:
                held.append(server.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/simple", server


def fix_and_stop_after(python: str, seconds: float) -> tuple[int, str]:
    """`doctor --fix`, with Ctrl-C after these seconds: exit code and all that it printed."""
    command = [python, "-m", "dpo_helpers", "doctor", "--fix", "--metadata-only"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(python).parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def look(python: str) -> tuple[dict[str, str], set[str]]:
    """The installed versions, by the names of the folders, and what `pip check` says of them."""
    infos = [path.name.removesuffix(".dist-info") for path in find_site(python).glob("[!~]*.dist-info")]
    named = (info.split("-")[:2] for info in infos)
    return {name.lower().replace("_", "-"): version for name, version in named}, pip_check(python)
