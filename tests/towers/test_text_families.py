from __future__ import annotations

import json
from pathlib import Path

import pytest
from text_families import FAMILIES, PROOFS, Member, make, row


@pytest.fixture(scope="module", params=FAMILIES)
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    return make(request.param, tmp_path_factory.mktemp("family") / "folder")


def test_family_is_on_the_page(member: Member, request: pytest.FixtureRequest) -> None:
    seen = json.loads((Path(__file__).parents[2] / "docs" / "towers.json").read_text())["text_towers"]
    [on_page] = [values for values in seen if values["family"] == request.node.callspec.params["member"]]
    assert on_page == row(on_page["family"], member)
    assert [values["family"] for values in seen] == list(FAMILIES)


@pytest.mark.parametrize("proof", PROOFS)
def test_family(proof: str, member: Member) -> None:
    PROOFS[proof](member)
