"""Your own classes, calibrated on labelled images, with "none of these" as a possible answer.

Run with: python examples/own_classes.py (it uses the model of `make quickstart`)
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lamplit

QUICKSTART, OUT = Path("runs/quickstart"), Path("runs/own_classes")
CLASSES = ("animals", "clothes", "food", "people", "plants", "vehicles")  # six of the stamps' fifteen categories
TEMPLATES = ("{}", "Some {}.", "an image of {}")


def main() -> None:
    """Make the class list with half of the images, then classify the others."""
    if not (QUICKSTART / "model").exists():
        subprocess.run([sys.executable, Path(__file__).with_name("quickstart.py")], check=True)
    OUT.mkdir(parents=True, exist_ok=True)
    pairs = lamplit.fetch("stamps")
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    labels = [row["category"] if row["category"] in CLASSES else "none" for row in rows]
    rows = [
        {"image": str(pairs.parent / row["image"]), "label": label} for row, label in zip(rows, labels, strict=True)
    ]
    random.Random(0).shuffle(rows)
    sample, others = rows[:350], rows[350:]
    (OUT / "sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sample), encoding="utf-8")

    classes = lamplit.make_classes(QUICKSTART / "model", CLASSES, templates=TEMPLATES, sample=OUT / "sample.jsonl")
    classes.save(OUT / "classes.json")
    report = classes.report
    print(f"sample: {report.images} images of a class, {report.out_of_class} of none")
    print(f"nearest class right: {report.accuracy:.2f}, before any image is refused as none of these")
    print(f"calibration error {report.error_before:.2f} before, {report.error_after:.2f} after")

    # From here on no text tower is needed: the file holds the vectors of the classes.
    model, classes = lamplit.load(QUICKSTART / "model", towers="image"), lamplit.ClassList.load(OUT / "classes.json")
    result = lamplit.classify(model, [row["image"] for row in others], classes)
    answers = [prediction.given[0] if prediction.given else "none" for prediction in result]
    counts = Counter((row["label"], row["label"] == answer) for row, answer in zip(others, answers, strict=True))
    for label in [*CLASSES, "none"]:
        right, wrong = counts[label, True], counts[label, False]
        print(f"{label:>10}: {right} of {right + wrong} images that were not in the sample")


if __name__ == "__main__":
    main()
