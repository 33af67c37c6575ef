"""A reader's way through both notebooks, in a real browser: JupyterLab in Debian's Chromium
(tools/install_browser.sh).

The main notebook is run once, as "Run > Run All Cells" does, with the demo's parameters; each test looks at
one thing in the page. The experiment notebook follows in its smallest form. Screenshots go to
outputs/browser/.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
import yaml

from dpo_helpers.data.own_rows import load_preferences
from dpo_helpers.judge.votes import read_votes

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
PICTURES = ROOT / "outputs" / "browser"
MAIN, EXPERIMENT = "colab_dpo_training.ipynb", "dpo_training_experiment.ipynb"
# Few rows keep it short; twelve epochs of them make the DPO training last some ten seconds, so that there is
# something to watch.
CHANGES = {MAIN: {"NUM_SAMPLES": 200, "NUM_TRAIN_EPOCHS": 12.0}, EXPERIMENT: {}}
PARAMETER_FILES = {MAIN: "demo_parameters.yaml", EXPERIMENT: "experiment_parameters.yaml"}
# what of a training cell's output may change in place and counts as a live view
LIVE_VIEW = "img, svg, table, progress"
LIVE_CHANGES = 3
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)

# Notes, four times a second, every state of each picture or table in the output of each code cell: {cell:
# {tag: states}}.
WATCH = """visuals => {
    const states = (window.states = {});
    setInterval(() => document.querySelectorAll(".jp-CodeCell").forEach((cell, number) => {
        for (const item of cell.querySelectorAll(".jp-OutputArea-output :is(" + visuals + ")")) {
            const tags = (states[number] ??= {});
            (tags[item.tagName.toLowerCase()] ??= new Set()).add(item.src || item.outerHTML);
        }
    }), 250);
}"""
COUNT_CHANGES = (
    "number => Math.max(0, ...Object.values(window.states[number] ?? {}).map(states => states.size - 1))"
)


def make_notebook(folder: Path, name: str) -> list[str]:
    """Write the copy that is run, with the parameters injected as papermill does; return the sources of
    its code cells.
    """
    notebook = nbformat.read(ROOT / name, as_version=4)
    parameters = (
        yaml.safe_load((ROOT / "tests" / PARAMETER_FILES[name]).read_text(encoding="utf-8")) | CHANGES[name]
    )
    cells = notebook.cells
    (place,) = (i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    lines = "".join(f"{name} = {value!r}\n" for name, value in parameters.items())
    cells.insert(place + 1, nbformat.v4.new_code_cell(f"# Parameters\n{lines}"))
    nbformat.write(notebook, folder / name)
    return [cell.source for cell in cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address, folder) of a JupyterLab on this machine, without token, news, or anything of the user's
    own settings.
    """
    folder, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    settings = home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # all cells stay in the page, those out of sight too
    page_config = home / "config" / "labconfig" / "page_config.json"
    page_config.parent.mkdir(parents=True)
    page_config.write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "PYTHONPATH": str(ROOT),
    }
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        f"--ServerApp.root_dir={folder}",
    ]
    options += ["--IdentityProvider.token=", "--ServerApp.password="]
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            wait_for_server(f"http://127.0.0.1:{port}/api", server, home / "lab.log")
            yield f"http://127.0.0.1:{port}", folder
        finally:
            server.terminate()  # it ends its kernels, too
            server.wait(30)


def wait_for_server(address: str, server, log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab does not answer at {address}:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "run tools/install_browser.sh"
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir(parents=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS.split())
        yield browser
        browser.close()


def run_notebook(browser, lab, name: str, watched: str):
    """Run a notebook whole in a page of its own; return (page, sources of its code cells). `watched` is
    text of the cell to picture.
    """
    address, folder = lab
    sources = make_notebook(folder, name)
    page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="ja-JP")
    page.goto(
        f"{address}/lab/workspaces/{name.partition('.')[0]}/tree/{name}"
    )  # a workspace keeps the tabs of another page out
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
    page.evaluate(WATCH, LIVE_VIEW)
    queue_all_cells(page, len(sources))
    run_to_the_end(page, sources, find_cell(sources, watched), Path(name).stem)
    return page, sources


@pytest.fixture(scope="module")
def run(lab, browser):
    """(page, sources of the code cells, folder) after the whole main notebook has run."""
    yield *run_notebook(browser, lab, MAIN, "train_dpo(run"), lab[1]


def queue_all_cells(page, count: int) -> None:
    """Choose "Run > Run All Cells" until every code cell waits or has run: JupyterLab at times takes the
    first one alone.
    """
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    for _ in range(5):
        page.wait_for_timeout(2000)
        page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_timeout(8000)
        texts = [text.strip() for text in prompts.all_inner_texts()]
        if len(texts) == count and "[ ]:" not in texts:
            return
    pytest.fail(f"JupyterLab did not take all cells: {texts}")


def find_cell(sources: list[str], text: str) -> int:
    """Return the number of the one code cell, besides the package's own, whose source holds `text`."""
    (number,) = (i for i, source in enumerate(sources) if text in source and "PACKED = " not in source)
    return number


def run_to_the_end(page, sources: list[str], watched: int, name: str, seconds: float = 600) -> None:
    """Wait until every code cell has run, with a picture of the watched one under way; fail at the first
    error in the page.
    """
    pictured, end = False, time.monotonic() + seconds
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    while time.monotonic() < end:
        errors = page.locator(
            '.jp-OutputArea-output [data-mime-type="application/vnd.jupyter.error"]'
        ).all_inner_texts()
        assert not errors, errors[0]
        numbers = [text.strip() for text in prompts.all_inner_texts()]
        if all(text[1:-2].isdigit() for text in numbers) and len(numbers) == len(sources):
            return
        if (
            not pictured
            and numbers[watched] == "[*]:"
            and page.evaluate(COUNT_CHANGES, watched) >= LIVE_CHANGES
        ):
            take_picture(page, watched, f"{name}-running")
            pictured = True
        page.wait_for_timeout(250)
    take_picture(page, watched, f"{name}-stuck")
    pytest.fail(f"after {seconds} s these prompts stand in the page: {numbers}")


def show_cell(page, number: int):
    cell = page.locator(".jp-CodeCell").nth(number)
    cell.scroll_into_view_if_needed()
    return cell


def take_picture(page, number: int, name: str) -> None:
    show_cell(page, number).screenshot(path=PICTURES / f"{name}.png")


def test_the_live_view_changes_during_the_training(run):
    page, sources, _ = run
    assert page.evaluate(COUNT_CHANGES, find_cell(sources, "train_dpo(run")) >= LIVE_CHANGES


def test_the_final_plots_are_there(run):
    page, sources, _ = run
    for name in ("plot_training(", "plot_token_report(lengths"):
        number = find_cell(sources, name)
        widths = (
            show_cell(page, number)
            .locator(".jp-OutputArea-output img")
            .evaluate_all("all => all.map(img => img.naturalWidth)")
        )
        assert widths and min(widths) > 300
    take_picture(page, find_cell(sources, "plot_training("), "plots")


def test_a_question_is_answered_in_the_box(run):
    page, sources, _ = run
    number = find_cell(sources, "ask_box(saved_model")
    cell = show_cell(page, number)
    cell.locator("button", has_text="質問する").click()
    cell.get_by_text("質問が空です").wait_for()
    cell.locator("input").press_sequentially("過学習とは何ですか？")
    cell.locator("input").press("Enter")
    cell.get_by_text("質問：過学習とは何ですか？").wait_for(timeout=60_000)
    answers = cell.locator(".jp-OutputArea-output div[style*='pre-wrap']").all_inner_texts()
    assert [answer.split("\n")[0] for answer in answers] == [
        "① ベースモデル",
        "② 教師あり学習の後",
        "③ DPO の後",
    ]
    assert all(len(answer.split("\n", 1)[1].strip()) > 3 for answer in answers)
    take_picture(page, number, "ask")


def test_votes_by_mouse_and_by_keyboard_are_training_data(run):
    page, sources, folder = run
    number, path = find_cell(sources, "vote_box(saved_model"), folder / "run" / "votes.jsonl"
    cell = show_cell(page, number)
    question, reveal = cell.locator("b", has_text="質問："), cell.get_by_text("投票しました")
    votes = (
        lambda: cell.locator("button", has_text="A が良い").click(),
        lambda: (
            page.keyboard.press("Tab"),
            page.keyboard.press("Space"),
        ),  # from A, which has the focus, to B
        lambda: cell.locator("input").press("s"),
    )
    for count, vote in enumerate(votes, 1):
        asked = question.inner_text().removeprefix("質問：")
        page.wait_for_timeout(700)  # a click sooner than a reader could make it is no vote
        vote()
        reveal.filter(has_text=asked).wait_for(timeout=60_000)
        question.wait_for()
        assert len(read_votes(path)) == count
    take_picture(page, number, "vote")
    rows, voted = load_preferences(path), read_votes(path)
    assert [row["chosen"] for row in rows] == [vote["chosen"] for vote in voted[:2]] and voted[2][
        "winner"
    ] == "tie"
    assert "引き分け 1、学習に使える行 2" in cell.inner_text()


def test_the_experiment_notebook_runs_whole_and_shows_every_section(lab, browser):
    page, sources = run_notebook(browser, lab, EXPERIMENT, "LEARNING_RATES, ")
    pictures = [number for number, source in enumerate(sources) if "\nplot_" in source]
    assert len(pictures) == 9  # section 4 has two
    for number in pictures:
        widths = (
            show_cell(page, number)
            .locator(".jp-OutputArea-output img")
            .evaluate_all("all => all.map(img => img.naturalWidth)")
        )
        assert widths and min(widths) > 300
        take_picture(page, number, f"experiment-{number:02}")
    cell = show_cell(page, find_cell(sources, "save_recommendation(CONFIG_FILE"))
    assert "設定ファイルは書きませんでした" in cell.inner_text()  # one seed recommends nothing
    assert not (lab[1] / "run_config.json").exists()
    assert (lab[1] / "outputs" / "experiments" / "results.jsonl").read_text(encoding="utf-8").count(
        '"status": "ok"'
    ) == 10
