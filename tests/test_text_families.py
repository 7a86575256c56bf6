from __future__ import annotations

import pytest
from text_families import FAMILIES, PROOFS, Member, make


@pytest.fixture(scope="module", params=FAMILIES)
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    return make(request.param, tmp_path_factory.mktemp("family") / "folder")


@pytest.mark.parametrize("proof", PROOFS)
def test_family(proof: str, member: Member) -> None:
    PROOFS[proof](member)
