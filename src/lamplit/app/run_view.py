"""The tuning run behind a model, read from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lamplit.errors import UsageError
from lamplit.tuning.checkpoint import read_log
from lamplit.tuning.run_folder import read_settings

MAX_STEPS = 500  # of a longer run, evenly spaced steps are shown


def read_run(folder: Path) -> dict[str, Any] | None:
    """Read settings, report and curves of the run in `folder`; None if it holds no finished run.

    Paths of this machine are left out.
    """
    try:
        settings = read_settings(folder / "settings.json")
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        lines = read_log(folder / "log.jsonl")
        settings["store"] = Path(settings["store"]).name
        report["out"] = Path(report["out"]).name
        report["skipped"] = len(report["skipped"])
    except (UsageError, OSError, ValueError, LookupError, TypeError):
        return None
    steps = [{key: line[key] for key in ("step", "loss", "lr", "logit_scale")} for line in lines if "loss" in line]
    evaluations = [{"step": line["step"], **line["held_out"]} for line in lines if line.get("held_out")]
    stride = max(1, -(-len(steps) // MAX_STEPS))
    return {"settings": settings, "report": report, "steps": steps[::stride], "held_out": evaluations}
