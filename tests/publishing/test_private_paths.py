from __future__ import annotations

from pathlib import Path

import pytest

from lamplit.publishing.private_paths import reduce_paths


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("hf:/home/ann/bert", "hf:bert"),
        ("model:/home/ann/runs/stamps", "model:stamps"),
        ("scratch:small@/home/ann/words.model", "scratch:small@words.model"),
        ("scratch:small@wordpiece", "scratch:small@wordpiece"),
        (r"C:\Users\ann\bert", "bert"),
        (r"hf:C:\Users\ann\bert", "hf:bert"),
        ("~/bert", "bert"),
        ("../towers/bert", "bert"),
        ("runs/old/bert", "bert"),
        ("hf:google/vit-base", "hf:google/vit-base"),
        ("open_clip:ViT-B-32/laion2b", "open_clip:ViT-B-32/laion2b"),
        ("timm:vit_base_patch16_224.augreg", "timm:vit_base_patch16_224.augreg"),
        ("https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("demo:minilm", "demo:minilm"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_a_path_is_its_last_part(text: str, public: str) -> None:
    assert reduce_paths(text) == public


def test_a_relative_path_that_is_here_is_no_name_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "towers" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = reduce_paths({"text": ["hf:towers/bert", "hf:google/bert"], "width": 64, "center": None})
    assert found == {"text": ["hf:bert", "hf:google/bert"], "width": 64, "center": None}
