from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest

from lamplit.errors import UsageError
from lamplit.tuning.settings import TuneSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 1),
        ("epochs", 0.0),
        ("epochs", math.nan),
        ("warmup_ratio", -0.1),
        ("warmup_ratio", 1.1),
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("num_evals", 0),
        ("patience", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("grad_clip", 0.0),
        ("weight_decay", -1.0),
        ("context_length", 2),
        ("lora", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("mode", "lu"),
        ("loss", "hinge"),
        ("optimizer", "sgd"),
        ("precision", "fp16"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is {value}; expected "):
        TuneSettings("demo:minilm", **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", "2", "epochs is '2', a str; expected a number or None"),
        ("lr", "1e-3", "lr is '1e-3', a str; expected a number or None"),
        ("batch_size", 64.0, "batch_size is 64.0, a float; expected a whole number or None"),
        ("steps", True, "steps is True, a bool; expected a whole number or None"),
        ("seed", None, "seed is None; expected a whole number"),
        ("image_head", 1, "image_head is 1, an int; expected True or False"),
        ("text_tower", None, "text_tower is None; expected a text"),
        ("epochs", float("inf"), "epochs is inf; expected a finite number"),
        ("weight_decay", float("nan"), "weight_decay is nan; expected a finite number"),
    ],
)
def test_wrong_types_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        TuneSettings(**{"text_tower": "demo:minilm", name: value})


def test_whole_number_is_a_number() -> None:
    assert TuneSettings("demo:minilm", epochs=5, lr=1).epochs == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 2),
        ("warmup_ratio", 0.0),
        ("warmup_ratio", 1.0),
        ("val_fraction", 0.0),
        ("patience", None),
        ("patience", 1),
        ("weight_decay", 0.0),
        ("seed", 2**63 - 1),
        ("mode", "Lu"),
        ("loss", "sigmoid"),
        ("optimizer", "adafactor"),
        ("precision", "bf16"),
    ],
)
def test_ends_of_ranges_are_taken(name: str, value: Any) -> None:
    assert getattr(TuneSettings("demo:minilm", **{name: value}), name) == value


def test_tower_from_scratch_cannot_be_pretrained() -> None:
    with pytest.raises(UsageError, match="scratch:tiny has no pre-trained weights"):
        TuneSettings("scratch:tiny", mode="LU")


@pytest.mark.parametrize(
    ("text", "mode", "pretrained"),
    [
        ("hf:any", "auto", True),
        ("hf:any", "LU", True),
        ("hf:any", "Lu", False),
        ("scratch:tiny", "auto", False),
        ("scratch:tiny", "Lu", False),
    ],
)
def test_mode_and_learning_rate_follow_the_text_tower(text: str, mode: Any, pretrained: bool) -> None:
    settings = TuneSettings(text, mode=mode)
    assert settings.pretrained_text is pretrained
    assert settings.has_kernel_head is pretrained
    assert settings.for_pairs(100).lr == (2e-5 if pretrained else 1e-3)
    assert settings.for_pairs(100).epochs == (4 if pretrained else 20)
    given = TuneSettings(text, mode=mode, lr=0.25, epochs=3, batch_size=8, num_evals=2)
    assert given.for_pairs(100) == given
    assert settings.for_pairs(100).batch_size == 1024


@pytest.mark.parametrize(
    ("changes", "few", "many"),
    [
        ({}, (2e-5, 4), (3e-4, 5)),
        ({"lora": 8}, (1e-4, 4), (1e-4, 5)),
        ({"head": "linear"}, (1e-5, 20), (1e-5, 20)),
        ({"closed_form": False}, (1e-5, 20), (1e-5, 20)),
        ({"closed_form": False, "lora": 8}, (1e-4, 20), (1e-4, 20)),
        ({"mode": "LL"}, (2e-5, 4), (3e-4, 5)),
        ({"mode": "uU"}, (1e-5, 20), (1e-5, 20)),
    ],
    ids=str,
)
def test_rate_and_epochs_follow_the_head_and_the_pairs(
    changes: dict[str, Any], few: tuple[float, float], many: tuple[float, float]
) -> None:
    settings = TuneSettings("demo:minilm", **changes)
    for pairs, expected in ((9_999, few), (10_000, many)):
        chosen = settings.for_pairs(pairs)
        assert (chosen.lr, chosen.epochs, chosen.num_evals) == (*expected, 10)


@pytest.mark.parametrize(("changes", "lr"), [({}, 3e-4), ({"lora": 8}, 1e-4)], ids=str)
def test_runs_that_leave_texts_out_have_defaults_of_their_own(changes: dict[str, Any], lr: float) -> None:
    chosen = TuneSettings("demo:minilm", **changes).for_pairs(4_000, leaves_out=True)
    assert (chosen.lr, chosen.epochs, chosen.num_evals) == (lr, 2, 2)
    sizes = [TuneSettings("demo:minilm").for_pairs(pairs, leaves_out=True).batch_size for pairs in (500, 4_000, 10_000)]
    assert sizes == [64, 500, 1024]
    given = TuneSettings("demo:minilm", lr=1e-3, epochs=1, batch_size=8, num_evals=2)
    assert given.for_pairs(4_000, leaves_out=True) == given


def test_kernel_head_needs_its_closed_form() -> None:
    for changes in ({"closed_form": False}, {"mode": "uU"}):
        with pytest.raises(UsageError, match="a kernel head starts in closed form"):
            TuneSettings("demo:minilm", head="kernel", **changes)  # type: ignore[arg-type]
    assert TuneSettings("scratch:tiny", head="kernel").has_kernel_head


def test_settings_are_frozen_and_roundtrip() -> None:
    settings = TuneSettings("demo:minilm", seed=3)
    with pytest.raises(FrozenInstanceError):
        settings.seed = 4  # type: ignore[misc]
    assert TuneSettings(**asdict(settings)) == settings
