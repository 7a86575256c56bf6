from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from ctrl_c import pressed_at
from safetensors import safe_open

from lamplit.tuning.interrupts import whole_steps
from lamplit.tuning.run import tune
from lamplit.tuning.settings import TuneSettings

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C in another way")


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_one_waits_and_the_second_one_does_not() -> None:
    with whole_steps() as is_stopped:
        assert not is_stopped()
        press()
        assert is_stopped()
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_where_it_is_not_wanted_or_not_possible() -> None:
    with pytest.raises(KeyboardInterrupt), whole_steps(wanted=False) as is_stopped:
        press()
    assert not is_stopped()
    seen = []

    def elsewhere() -> None:
        with whole_steps() as stopped:
            seen.append((stopped(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(False, signal.default_int_handler)]


def test_a_handler_of_the_callers_stays() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with whole_steps() as is_stopped:
            press()
            assert not is_stopped()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_keeps_the_step_and_ends_in_the_same_bytes(words_path: Path, text_folder: Path, tmp_path: Path) -> None:
    settings = TuneSettings(f"hf:{text_folder}", epochs=6, batch_size=64, num_evals=2)
    whole, out = tmp_path / "whole", tmp_path / "run"
    tune(words_path, whole, settings)

    with pressed_at(out / "log.jsonl", 4):
        tune(words_path, out, settings)
    with safe_open(out / "checkpoints" / "last.safetensors", framework="pt") as checkpoint:
        kept = json.loads(checkpoint.metadata()["lamplit"])["progress"]["step"]
    logged = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert 0 < kept < 27
    assert kept == logged[-1]
    tune(words_path, out, settings)
    name = "text_tower.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
