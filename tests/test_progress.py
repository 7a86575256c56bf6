import time

import pytest

from lamplit.progress import progress_bar


@pytest.mark.parametrize(("seconds", "is_left"), [(0.0, False), (1.2, True)])
def test_a_bar_that_took_a_moment_leaves_nothing_behind(
    seconds: float, is_left: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("vectors", 3, shown=True) as advance:
        time.sleep(seconds)
        advance(3, "")
    assert ("vectors" in capfd.readouterr().err) is is_left


def test_a_bar_stays_where_work_failed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), progress_bar("vectors", 3, shown=True):
        raise ValueError("broken")
    assert "vectors" in capfd.readouterr().err
