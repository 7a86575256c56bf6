"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from pathlib import Path

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

import lamplit
from lamplit.app.server import make_app
from lamplit.store.lance_store import Store


def test_requests_are_counted_by_route(model_path: Path, store: Store) -> None:
    client = TestClient(make_app(lamplit.load(model_path), store), base_url="http://localhost")
    for _ in range(3):
        client.post("/search", json={"query": "a ring"})
    client.post("/search", json={"query": ""})
    client.get("/thumbnail", params={"id": "../../etc/passwd"})
    client.get("/somewhere/else")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert found["lamplit_images",] == len(store)
    assert found["lamplit_requests_total", "POST", "/search", "200"] == 3
    assert found["lamplit_requests_total", "POST", "/search", "422"] == 1
    assert found["lamplit_requests_total", "GET", "/thumbnail", "404"] == 1
    assert found["lamplit_requests_total", "GET", "none", "404"] == 1
    assert found["lamplit_request_seconds_count", "POST", "/search"] == 4
    assert found["lamplit_request_seconds_sum", "POST", "/search"] > 0
    assert "passwd" not in answer.text
    assert "else" not in answer.text
