from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from lamplit.errors import UsageError
from lamplit.tuning.settings import TuneSettings, list_recipes, read_recipe, recipe_settings

NAMES = ["cc12m", "private-4b", "public-b16b-2", "public-l16l", "yfcc-clip"]
# Table 13 and appendix D of the paper: optimizer, learning rate, weight decay, steps of 16,384, mode.
PAPER = {
    "private-4b": ("adafactor", 1e-3, 0.0, 55_000, "Lu"),
    "cc12m": ("adamw", 1e-3, 1e-4, 12_000, "LU"),
    "yfcc-clip": ("adamw", 8e-4, 1e-4, 60_000, "LU"),
    "public-l16l": ("adafactor", 8e-4, 1e-4, 60_000, "LU"),
    "public-b16b-2": ("adamw", 8e-4, 1e-4, 60_000, "LU"),
}


def test_list_recipes() -> None:
    assert list_recipes() == NAMES == sorted(PAPER)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_the_papers_run_in_our_units(name: str) -> None:
    recipe = read_recipe(name)
    paper, settings = recipe["paper"], TuneSettings(**recipe["settings"])
    optimizer, lr, weight_decay, steps, mode = PAPER[name]
    assert (settings.optimizer, settings.lr, settings.steps, settings.mode) == (optimizer, lr, steps, mode)
    assert (paper["lr"], paper["weight_decay"], paper["steps"], paper["batch_size"]) == (
        lr,
        weight_decay,
        steps,
        16_384,
    )
    # big_vision subtracts `schedule * weight_decay * p`, torch `schedule * lr * weight_decay * p`.
    assert settings.weight_decay == pytest.approx(weight_decay / lr)
    assert round(settings.warmup_ratio * settings.steps, -2) == paper["warmup_steps"]
    assert settings.batch_size == paper["batch_size"]
    assert settings.context_length == 16
    assert settings.loss == "softmax"
    # 12,000 steps are 197 million pairs, which the paper calls 200.
    assert paper["pairs"] == pytest.approx(steps * 16_384, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_explained_or_plain(name: str) -> None:
    """A recipe says how it is run, where its values come from, and what was translated."""
    text = (files("lamplit") / "tuning" / "paper" / f"{name}.toml").read_text()
    assert f"--recipe {name}" in text
    recipe = read_recipe(name)
    assert recipe["source"]
    if recipe["paper"]["weight_decay"]:
        [line] = [line for line in text.splitlines() if line.startswith("weight_decay") and "/" in line]
        assert f"{recipe['paper']['weight_decay']:.0e}".replace("e-04", "e-4") in line


def test_own_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[settings]\ntext_tower = "demo:minilm"\nlr = 1e-4\n')
    assert read_recipe(str(file)) == {"settings": {"text_tower": "demo:minilm", "lr": 1e-4}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[settings]\nlearning_rate = 1\n", "unknown keys: settings.learning_rate; known: text_tower, mode"),
        ("[setings]\nlr = 1\n", "has no \\[settings\\]"),
        ("[settings]\n[extra]\n", "unknown keys: extra"),
        ("lr: 3", "is not TOML"),
        (
            "[settings]\nwarmup = 0.1\nhead_start = true\n",
            "rename them: warmup is now warmup_ratio, head_start is now closed_form",
        ),
    ],
)
def test_unknown_keys_are_refused(content: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(content)
    with pytest.raises(UsageError, match=expected):
        read_recipe(str(file))


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="there is no recipe cc3m; expected a TOML file, or one of cc12m, private-4b"):
        read_recipe("cc3m")


def test_given_settings_win_over_the_recipe(tmp_path: Path) -> None:
    settings = TuneSettings.from_recipe("cc12m", batch_size=64, closed_form=True, steps=None)
    assert (settings.batch_size, settings.closed_form, settings.steps) == (64, True, None)
    assert (settings.lr, settings.context_length) == (1e-3, 16)
    file = tmp_path / "mine.toml"
    file.write_text("[settings]\nlr = 1e-4\n")
    assert TuneSettings.from_recipe(file, text_tower="demo:minilm") == TuneSettings("demo:minilm", lr=1e-4)
    with pytest.raises(UsageError, match="names no text tower; give text_tower="):
        TuneSettings.from_recipe(file)
    assert recipe_settings(None, lr=0.5) == {"lr": 0.5}
    assert recipe_settings(file, epochs=2.0) == {"lr": 1e-4, "epochs": 2.0}
