from __future__ import annotations

from hashlib import blake2b

import numpy as np

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.towers.identity import TowerIdentity

TOWER = TowerIdentity("timm:some", "ab" * 16, 4, Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3), {"library": "timm"})


def test_round_trip() -> None:
    assert TowerIdentity.from_dict(TOWER.to_dict()) == TOWER
    imported = TowerIdentity.of_imported("acme", 4)
    assert TowerIdentity.from_dict(imported.to_dict()) == imported


def test_space_is_the_towers_own_unless_something_comes_behind_it() -> None:
    assert TOWER.space() == TOWER.fingerprint
    center, weight = np.arange(4, dtype=np.float32), np.ones((2, 4), np.float32)
    expected = blake2b(TOWER.fingerprint.encode() + center.tobytes() + weight.tobytes(), digest_size=16).hexdigest()
    assert TOWER.space([center, weight]) == expected
    assert TOWER.space([center]) not in (expected, TOWER.fingerprint)
