"""Measures the data module: 1,000 rows generated and validated, and an own JSONL file of 1,000,000 rows
(rows/s, peak memory).
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from dpo_helpers.data.generate import generate_preferences
from dpo_helpers.data.own_rows import load_preferences


def write_file(path: Path, rows: list[dict], count: int) -> None:
    """Write `count` different rows in the user's form: the given ones over and over, each with its number
    in the question.
    """
    texts = [json.dumps({**row, "prompt": f"NUMBER {row['prompt']}"}, ensure_ascii=False) for row in rows]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(texts[i % len(texts)].replace("NUMBER", str(i), 1) + "\n" for i in range(count))


def measure(work) -> tuple[float, float, int]:
    """Return (wall seconds, seconds on a processor, number of rows) of one piece of work: they differ on a
    busy machine.
    """
    wall, processor = time.perf_counter(), time.process_time()
    count = len(work())
    return time.perf_counter() - wall, time.process_time() - processor, count


def main(count: int) -> int:
    rows: list[dict] = []
    generated, generated_processor, _ = measure(
        lambda: rows.extend(generate_preferences(1000, seed=42)) or rows
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        small, small_processor, kept_small = measure(lambda: load_preferences(path))
        write_file(path, rows, count)
        size = path.stat().st_size
        large, large_processor, kept = measure(lambda: load_preferences(path))
    # Linux counts in KiB, macOS in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{kept_small:,} rows generated: {generated:.2f} s ({generated_processor:.2f} s of processor time)")
    print(
        f"{kept_small:,} rows validated, imports included: {small:.2f} s "
        f"({small_processor:.2f} s of processor time)"
    )
    print(
        f"{kept:,} rows, {size / 1e6:.0f} MB of JSONL, validated: {large:.1f} s, {kept / large:,.0f} rows/s",
        end=" ",
    )
    print(f"({large_processor:.1f} s of processor time, {kept / large_processor:,.0f} rows/s)")
    print(f"peak memory of the process: {peak / 2**20:.0f} MiB")
    good = kept == count and generated + small <= 1.0 and kept / large >= 20_000 and peak <= 2**30
    print(
        "within the limits (1 s; 20,000 rows/s; 1 GiB)"
        if good
        else "OUTSIDE THE LIMITS (1 s; 20,000 rows/s; 1 GiB)"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000))
