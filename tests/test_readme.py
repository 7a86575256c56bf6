"""The README is short, its code blocks run, and its figures are those of the documentation."""

from __future__ import annotations

import re

import pytest
from documents import DOCS, ROOT, need_stamps, run_blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 110


@pytest.mark.slow
def test_code_blocks_run(tmp_path):
    need_stamps()
    commands, program = run_blocks(README, tmp_path)
    assert "A horse." in commands
    assert "image_to_text/recall@1" in commands
    assert re.search(r"captions.*held out", commands)
    assert re.search(r"owl\.png\W+bird", commands)
    assert len(re.findall(r"^\d\.\d\d .*\.(?:png|jpg)$", program, re.MULTILINE)) == 3
    assert program.rstrip().splitlines()[-1].startswith("tensor([")


def test_is_short():
    lines = README.splitlines()
    assert len(lines) <= MAX_LINES
    assert sum(line.startswith("|") and "---" in line for line in lines) == 2  # the extras, and one of figures


def test_speed_rows_are_those_of_the_page():
    """Every figure of speed is in docs/speed.md with the same script, and the script exists."""
    speed = (DOCS / "speed.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| ([\d.]+) \| `(benchmarks/\w+\.py)` \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for what, figure, script in rows:
        assert (ROOT / script).is_file()
        assert [line for line in speed.splitlines() if script in line and re.search(rf"\b{figure}\b", line)], what
