"""One index, four languages: each has a text tower, all read the same vectors, and no image is embedded again.

Run with: python examples/languages.py (it uses the store and the English model of `make quickstart`)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lamplit

QUICKSTART, OUT = Path("runs/quickstart"), Path("runs/languages")
MEANING = "a hat"
LANGUAGES = {  # the column of captions, the query, and its sound in Latin letters, which every font has
    "English": ("texts", "a hat", "a hat"),
    "German": ("text_de", "ein Hut", "ein Hut"),
    "Japanese": ("text_ja", "ぼうし", "boshi"),
    "Arabic": ("text_ar", "قبعة", "qubba'a"),
}


def main() -> None:
    """Tune the missing models, measure each language, and search the one store in all of them."""
    if not (QUICKSTART / "model").exists():
        subprocess.run([sys.executable, Path(__file__).with_name("quickstart.py")], check=True)
    OUT.mkdir(parents=True, exist_ok=True)
    store = lamplit.Store(QUICKSTART / "stamps.lance")
    found = {}
    for language, (column, query, sound) in LANGUAGES.items():
        model = QUICKSTART / "model" if language == "English" else OUT / language.lower()
        if language != "English":
            # The encoder has read only English. Other languages start from single letters, and need a higher rate.
            settings = lamplit.TuneSettings(
                text_tower="demo:minilm", text_column=column, epochs=3, batch_size=64, lr=2e-4, num_evals=1
            )
            lamplit.tune(store, model, settings)
        report = json.loads((model / "report.json").read_text())
        recall, chance = report["last"]["text_to_image/recall@5"], 5 / report["held_out_captions"]
        searcher = lamplit.Searcher(lamplit.load(model, towers="text"), store)
        hits = searcher.search(query, k=6)
        found[f"{language}: {sound}" if sound == MEANING else f"{language}: {sound} ({MEANING})"] = hits
        print(f"{language}: {query} finds {', '.join(hit.texts[0] for hit in hits)}")
        print(f"{language}: held-out captions find their image: recall@5 {recall:.3f}, chance {chance:.3f}")
    lamplit.contact_sheet(found, OUT / "languages.png")
    print(f"images: {OUT / 'languages.png'}")


if __name__ == "__main__":
    main()
