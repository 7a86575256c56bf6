"""Press Ctrl-C in every long command at random moments: each ends in one line, with code 130, and leaves no process.

    python tests/campaigns/interrupt_commands.py --trials 10

Each trial starts every command in a process group of its own, as a terminal does, and sends SIGINT to the group at a
random moment; from that of the first command on, which embeds, all work on what earlier trials have left. POSIX alone.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

import lamplit

IMAGES, VECTORS = 400, 60_000
PATIENCE = 120.0  # seconds for an interrupted command to end
MOMENT = 5.0  # seconds for the processes that it had started to notice that it is gone
TOWERS = ("--image-tower", "timm:test_vit", "--image-tower-weights", "random")
TEXT = ("--text-tower", "scratch:tiny", "--mode", "Lu")


def main() -> None:
    """Run the trials; exit with 1 if one of them fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    chance = random.Random(options.seed)
    print(f"seed {options.seed}", flush=True)
    os.environ["PYTHONPATH"] = str(Path(lamplit.__file__).parents[1].resolve())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        trials = [(trial, command) for trial in range(options.trials) for command in commands(trial)]
        failed = sum(not is_well_interrupted(command, chance.uniform(0.8, 8)) for _, command in trials)
    print(f"{failed} of {len(trials)} trials failed")
    sys.exit(failed > 0)


def prepare() -> None:
    """Make images with captions, vectors, and a store and a model that nobody disturbs."""
    pixels = np.random.default_rng(0)
    Path("images").mkdir()
    lines = ["path,caption"]
    for number in range(IMAGES):
        Image.fromarray(pixels.integers(0, 255, (96, 96, 3), np.uint8)).save(f"images/{number}.png")
        lines.append(f"images/{number}.png,thing {number} in colour {number % 7}")
    Path("pairs.csv").write_text("\n".join(lines))
    np.save("vectors.npy", pixels.standard_normal((VECTORS, 32)).astype(np.float16))
    for command in (
        ("embed", "pairs.csv", *TOWERS, "--out", "whole.lance"),
        ("tune", "whole.lance", *TEXT, "--epochs", "1", "--out", "model"),
    ):
        subprocess.run([sys.executable, "-m", "lamplit", *command], check=True, stdout=subprocess.DEVNULL)


def commands(trial: int) -> list[tuple[str, ...]]:
    """Every command that takes long."""
    return [
        ("embed", "pairs.csv", *TOWERS, "--workers", "2", "--batch-size", "8", "--out", "a.lance"),
        ("tune", "whole.lance", *TEXT, "--steps", "2000", "--batch-size", "64", "--out", "run", "--log-to", "csv"),
        ("import", "vectors.npy", "--image-tower", "x:y", "--out", f"vectors{trial}.lance"),
        ("duplicates", "whole.lance"),
        ("evaluate", "model", "whole.lance"),
        ("export", "model", "--to", "onnx", "--out", f"export{trial}"),
        ("compare", "whole.lance", "--text-towers", TEXT[1], "--modes", "Lu", "--seeds", "2", "--out", "comparison"),
        ("plan", "pairs.csv", *TOWERS, *TEXT),
        ("search", "model", "whole.lance", "thing 3", "--min-score", "auto"),
    ]


def is_well_interrupted(command: tuple[str, ...], after: float) -> bool:
    """Run a command, interrupt it, and tell whether it ended as it should; print what it said if not."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lamplit", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        _, said = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, process.returncode = "it did not end", 1
    # Before Python listens to the signal and after it has ended its work, the signal itself ends the process.
    is_well = process.returncode in (0, 130, -signal.SIGINT) and "Traceback" not in said and "error: " not in said
    if left := left_behind(process.pid):
        is_well, said = False, f"{said}\nleft: {left}"
    if not is_well:
        print(f"{command[0]} after {after:.1f} s: code {process.returncode}\n{said[-2000:]}", flush=True)
    return is_well


def left_behind(group: int) -> list[str]:
    """Wait until all processes of a group have ended; return the commands of those that have not."""
    ends = time.monotonic() + MOMENT
    while left := [process for process in psutil.process_iter() if group_of(process) == group]:
        if time.monotonic() > ends:
            return [" ".join(process.cmdline()) for process in left]
        time.sleep(0.05)
    return []


def group_of(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return -1


if __name__ == "__main__":
    main()
