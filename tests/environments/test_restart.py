"""Done when 6: a restart is asked for when, and only when, something imported changed on disk.

In a real kernel with Colab's IPython and ipykernel on Python 3.13, on Colab's metadata.
"""

import contextlib
import json
import os
import queue
import time

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from simulate import COLAB_PIP, ROOT, load_image, make_wheel, run, set_up

pytestmark = pytest.mark.environments
KERNEL = [
    "ipython",
    "ipykernel",
    "traitlets",
    "jupyter-client",
    "jupyter-core",
    "tornado",
    "pyzmq",
    "psutil",
    "nest-asyncio",
    "debugpy",
    "matplotlib-inline",
    "decorator",
    "pickleshare",
    "prompt-toolkit",
    "wcwidth",
    "pygments",
    "backcall",
    "pexpect",
    "ptyprocess",
    "python-dateutil",
    "six",
    "platformdirs",
]


INSTALL = (
    "from dpo_helpers.setup.packages import install_missing\n"
    "print(install_missing({requirements!r}, auto_restart={auto_restart}))"
)
LOOK = "from dpo_helpers.setup.doctor import quick_fix\nprint(quick_fix(metadata_only=True).exit_code)"


@pytest.fixture(scope="module")
def colab(make, tmp_path_factory):
    """The image with its kernel stack real, and two made packages whose 1.0 and 2.0 lie in a local folder."""
    image = load_image("image-2026-08-19.json")
    real = [f"{name}=={image.pop(name)['version']}" for name in KERNEL]
    python = make(image, python="3.13", pip=COLAB_PIP)
    process = run(python, "-m", "pip", "install", "--no-deps", *real, "entrypoints", "jedi", "parso")
    assert process.returncode == 0, process.stderr
    set_up(python)
    index = tmp_path_factory.mktemp("index")
    for version in ("1.0", "2.0"):
        make_wheel(
            index, "made-with-version", version, [], {"made_with_version.py": f"__version__ = '{version}'\n"}
        )
        make_wheel(
            index, "made-without-version", version, [], {"made_without_version.py": f"color = '{version}'\n"}
        )
    variables = {
        "PYTHONPATH": str(ROOT),
        "PIP_FIND_LINKS": f"{index} {os.environ.get('PIP_FIND_LINKS', '')}".strip(),
    }
    kernel = tmp_path_factory.mktemp("jupyter") / "kernels" / "colab"
    kernel.mkdir(parents=True)
    launch = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": launch, "display_name": "colab", "language": "python", "env": variables})
    )
    return python, variables, str(kernel.parents[1])


@pytest.fixture
def run_cells(colab, monkeypatch):
    """run_cells(*sources) → what each cell printed, in a fresh kernel; both made packages are at 1.0
    before the first call.
    """
    python, variables, jupyter_path = colab
    process = run(
        python,
        "-m",
        "pip",
        "install",
        "made-with-version==1.0",
        "made-without-version==1.0",
        environment=variables,
    )
    assert process.returncode == 0, process.stderr
    monkeypatch.setenv("JUPYTER_PATH", jupyter_path)

    def run_them(*sources: str) -> list[str]:
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook = nbformat.v4.new_notebook(cells=cells)
        NotebookClient(notebook, kernel_name="colab", timeout=120).execute()
        return ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]

    return run_them


def install(*requirements: str, auto_restart: bool = False) -> str:
    return INSTALL.format(requirements=requirements, auto_restart=auto_restart)


def test_the_kernel_is_colabs(run_cells):
    said = run_cells(
        "import IPython, ipykernel, sys; print(IPython.__version__, ipykernel.__version__, sys.version[:4])"
    )
    assert said == ["7.34.0 6.17.1 3.13\n"]


def test_no_restart_for_what_changed_before_it_was_imported(run_cells):
    said = run_cells(
        install("made-with-version>=2", "made-without-version>=2"),
        "import made_with_version, made_without_version",
        LOOK,
    )
    assert "2.0" in said[0] and "再起動は必要ありません" in said[0] and said[0].endswith("False\n")
    assert "再起動は必要ありません" in said[2] and said[2].endswith("0\n")


@pytest.mark.parametrize("name", ["made-with-version", "made-without-version"])
def test_a_restart_is_asked_for_when_an_imported_package_moved(run_cells, name):
    said = run_cells(f"import {name.replace('-', '_')}", install(f"{name}>=2"))
    assert f"再起動が必要です: {name} は" in said[1] and said[1].endswith("True\n")


def test_a_restart_is_asked_for_when_the_user_moved_it_with_pip(run_cells):
    said = run_cells("import made_with_version", "%pip install --quiet made-with-version==2.0", LOOK)
    assert "再起動が必要です: made-with-version は" in said[2] and said[2].endswith("2\n")


def test_the_notebook_goes_on_after_its_own_restart(colab, run_cells):
    """All cells are queued at once, as "run all" does; the manager brings the kernel back, as Colab's
    server does.
    """
    cells = (
        "import made_with_version\nprint(made_with_version.__version__)",
        install("made-with-version>=2", auto_restart=True),
        "print('end')",
    )
    manager = KernelManager(kernel_name="colab")
    manager.start_kernel()
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        first = queue_cells(client, cells)
        assert [status for status, _ in first] == ["ok", "error", "aborted"]
        assert (
            first[0][1] == "1.0\n"
            and "再起動が必要です: made-with-version は" in first[1][1]
            and first[2][1] == ""
        )
        deadline = time.monotonic() + 10
        while manager.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not manager.is_alive()

        manager.restart_kernel()
        client.wait_for_ready(timeout=60)
        second = queue_cells(client, cells)
        assert [status for status, _ in second] == ["ok", "ok", "ok"]
        assert second[0][1] == "2.0\n" and second[2][1] == "end\n"
        assert "何も変更しませんでした" in second[1][1] and "再起動は必要ありません" in second[1][1]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def queue_cells(client, cells: tuple[str, ...]) -> list[tuple[str, str]]:
    """(status, printed text) of each cell."""
    texts, statuses = {client.execute(cell, stop_on_error=True): "" for cell in cells}, {}
    while len(statuses) < len(cells):
        reply = client.get_shell_msg(timeout=120)
        if (
            reply["parent_header"].get("msg_id") in texts
        ):  # else an answer to the question whether the kernel is ready
            statuses[reply["parent_header"]["msg_id"]] = reply["content"]["status"]
    with contextlib.suppress(queue.Empty):
        while True:
            message = client.get_iopub_msg(timeout=1)
            if message["msg_type"] == "stream" and message["parent_header"].get("msg_id") in texts:
                texts[message["parent_header"]["msg_id"]] += message["content"]["text"]
    return [(statuses[cell], text) for cell, text in texts.items()]
