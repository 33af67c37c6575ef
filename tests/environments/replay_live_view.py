"""Runs in the environment under test: replays a log through the live view in that environment's kernel,
prints what was sent.

python replay_live_view.py LOG_HISTORY.json    # the package must be importable
"""

import json
import sys

import nbformat
from nbclient import NotebookClient

REPLAY = """
import json, time
from dpo_helpers.train.live_display import LiveDisplay
log = json.load(open({path!r}))
last = log[-1]["step"]
now, seconds = [0.0], []
shown = LiveDisplay("dpo", 4, "cpu", clock=lambda: now[0])
for i in range(len(log) + 1):
    start = time.perf_counter()
    if i == 0:
        shown.begin(0, last, [], beta=0.1)
    else:
        shown.update(log[i - 1]["step"], log[:i])
    seconds.append(time.perf_counter() - start)
    now[0] += 3
shown.finish()
json.dumps({{"median": sorted(seconds)[len(seconds) // 2], "most": max(seconds)}})
"""
PLOT = """
import json
from dpo_helpers.train.plots import plot_training
plot_training(json.load(open({path!r})), beta=0.1)
"""


class Recorder(NotebookClient):
    def process_message(self, message, cell, cell_index):
        if message["msg_type"] in ("display_data", "update_display_data"):
            sent.append((message["msg_type"], message["content"].get("transient", {}).get("display_id")))
        return super().process_message(message, cell, cell_index)


sent = []
notebook = nbformat.v4.new_notebook(
    cells=[nbformat.v4.new_code_cell(cell.format(path=sys.argv[1])) for cell in (REPLAY, PLOT)]
)
Recorder(notebook, timeout=60, kernel_name="python3").execute()
replay, plot = (cell.outputs for cell in notebook.cells)
print(
    json.dumps(
        {
            "sent": sent,
            "view": [output["data"] for output in replay if output["output_type"] == "display_data"],
            "seconds": [
                json.loads(output["data"]["text/plain"].strip("'"))
                for output in replay
                if output["output_type"] == "execute_result"
            ],
            "plot": [sorted(output.get("data", output)) for output in plot],
            "streams": [output["text"] for output in [*replay, *plot] if output["output_type"] == "stream"],
        }
    )
)
