"""The HTTP API and what guards it, asked in this process; test_page.py asks a running server."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import torch
from conftest import write_store
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from torch.nn import functional as F
from typer.testing import CliRunner

import lamplit
from lamplit.app import messages as m
from lamplit.app.kept_rows import plain
from lamplit.app.launch import address, listen
from lamplit.app.server import make_app
from lamplit.app.service import Service
from lamplit.cli import main as cli
from lamplit.errors import MissingExtraError, StoreError, TowerError, UsageError
from lamplit.model import LiT
from lamplit.store.lance_store import Store
from lamplit.store.table.rows import Row
from lamplit.zeroshot.class_list import ClassList
from lamplit.zeroshot.classifier import class_list

CHECKS = [
    schemathesis.checks.not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
CLASSES = ["circle", "square", "cross"]


@pytest.fixture(scope="module")
def model(model_path: Path) -> LiT:
    return lamplit.load(model_path)


@pytest.fixture(scope="module")
def client(model: LiT, store_path: Path, model_path: Path) -> TestClient:
    return TestClient(make_app(model, Store(store_path), name=str(model_path)), base_url="http://127.0.0.1")


def id_of(store: Store, name: str) -> str:
    [found] = [row for row in store.column("id") if Path(row).stem == name]
    return str(found)


def classified(*arguments: object) -> list[dict[str, Any]]:
    """Run `lamplit classify`; return what it prints as JSON."""
    done = CliRunner().invoke(cli.app, ["classify", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def said(response: Any) -> str:
    """Return the sentence of an error; every error is JSON with one, and no traceback."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert "Traceback" not in body["error"]
    return str(body["error"])


def png(color: str = "red", side: int = 20) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), color).save(file, "PNG")
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Make a PNG of a few bytes that says it is as large as asked."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


# --- Search


def test_words_find_what_the_library_finds(client: TestClient, model: LiT, store: Store) -> None:
    answer = client.post("/search", json={"query": "A small red circle.", "k": 5})
    assert m.SearchAnswer.model_validate_json(answer.content).model_dump_json().encode() == answer.content
    hits = answer.json()["hits"]
    expected = lamplit.search(model, store, "A small red circle.", k=5)
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-6)
    assert hits[0]["texts"] == expected[0].texts
    assert hits[0]["metadata"] == expected[0].metadata
    assert hits[0]["name"] == Path(expected[0].path).name


def test_answers_to_words_say_what_is_probably_none(
    client: TestClient, model: LiT, store_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(store_path, tmp_path / "a.lance")
    measured = TestClient(make_app(model, Store(tmp_path / "a.lance"), relevance=True), base_url="http://127.0.0.1")
    answer = measured.post("/search", json={"query": "A small red circle."}).json()
    searcher = lamplit.Searcher(model, tmp_path / "a.lance")
    assert answer["min_score"] == pytest.approx(searcher.min_score(searcher.encode("A small red circle.")))
    assert measured.post("/search", json={"like": answer["hits"][0]["id"]}).json()["min_score"] is None
    assert client.post("/search", json={"query": "ring"}).json()["min_score"] is None  # nobody measured it there


def test_sum_of_words_finds_what_the_library_finds(client: TestClient, model: LiT, store: Store) -> None:
    query = '"A small red circle." - 0.7 * "ring"'
    hits = client.post("/search", json={"query": query, "k": 5}).json()["hits"]
    expected = lamplit.search(model, store, query, k=5)
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-6)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        (" \t ", "query"),
        ('""', "the query is blank"),
        ('"ring" - " "', "the query is blank"),
        ('"ring" "red"', "expected + or -"),
        ('"ring" - "ring"', "cancel each other"),
    ],
)
def test_query_without_meaning_is_a_sentence(client: TestClient, query: str, sentence: str) -> None:
    answer = client.post("/search", json={"query": query})
    assert answer.status_code == 422
    assert sentence in said(answer)


def test_nothing_says_where_the_images_are(client: TestClient, image_folder: Path, store: Store) -> None:
    answers = [
        client.post("/search", json={"query": "ring"}),
        client.get("/about"),
        client.get("/map"),
        client.get("/map/regions"),
    ]
    answers.append(client.get("/item", params={"id": store.column("id")[0]}))
    assert not [answer.url for answer in answers if str(image_folder) in answer.text]


def test_condition_does_not_tell_where_the_images_are(client: TestClient, image_folder: Path, store: Store) -> None:
    """By LIKE, letter by letter; what is shown of an image may be asked for."""
    assert store.where(f"path LIKE '{image_folder}%'").all()
    for where in (f"path LIKE '{image_folder}%'", "shape = 'ring' or `Path` < 'x'", "hash > 'a'"):
        for asked in ({"query": "ring"}, {"like": store.column("id")[0]}):
            answer = client.post("/search", json={**asked, "where": where})
            assert answer.status_code == 422
            assert re.search("names '(path|Path|hash)', which is not there; there are: id, texts, ", said(answer))
    for where in ("id LIKE '%ring%'", "'none' in texts or shape = 'ring'"):
        assert client.post("/search", json={"query": "ring", "where": where}).json()["hits"]


def test_image_that_is_sent_finds_itself(client: TestClient, image_folder: Path, store: Store) -> None:
    [file] = image_folder.glob("large_blue_triangle.*")
    answer = client.post("/search", files={"image": (file.name, file.read_bytes())}, data={"k": 3})
    hits = answer.json()["hits"]
    assert len(hits) == 3
    assert hits[0]["name"] == file.name
    assert hits[0]["score"] == pytest.approx(1, abs=1e-3)


def test_neighbours_leave_the_image_out(client: TestClient, store: Store) -> None:
    name = id_of(store, "large_blue_triangle")
    first = client.post("/search", json={"like": name, "k": 6}).json()["hits"]
    assert len(first) == 6
    assert name not in [hit["id"] for hit in first]
    rest = client.post("/search", json={"like": name, "k": 3, "offset": 3}).json()["hits"]
    assert [hit["id"] for hit in rest] == [hit["id"] for hit in first[3:]]


def test_pages_follow_each_other_and_the_condition_holds(client: TestClient) -> None:
    whole = client.post("/search", json={"query": "ring", "k": 60, "where": "shape = 'ring'"}).json()["hits"]
    assert len(whole) == 12
    assert {hit["metadata"]["shape"] for hit in whole} == {"ring"}
    second = client.post("/search", json={"query": "ring", "k": 4, "offset": 4, "where": "shape = 'ring'"}).json()
    assert [hit["id"] for hit in second["hits"]] == [hit["id"] for hit in whole[4:8]]
    assert client.post("/search", json={"query": "ring", "offset": 1000}).json()["hits"] == []


@pytest.mark.parametrize(
    "where", ["colour = 'red'", "shape = ", "texts", "; drop table", "shape = 'a' or", "'", "1", "shape + 1 = 2", "((("]
)
def test_condition_that_cannot_be_read_is_a_sentence(client: TestClient, where: str) -> None:
    answer = client.post("/search", json={"query": "ring", "where": where})
    assert answer.status_code == 422
    assert "condition" in said(answer)


@pytest.mark.parametrize("where", ["repeat(shape, 1000000000) = 'a'", "shape = REPEAT ('a', 9)", "length(`shape`) > 1"])
def test_condition_takes_no_functions(client: TestClient, where: str) -> None:
    answer = client.post("/search", json={"query": "ring", "where": where})
    assert answer.status_code == 422
    assert "no functions" in said(answer)


def test_condition_takes_lists_brackets_and_quotes(client: TestClient) -> None:
    where = "shape in ('ring', 'f(x)', 'it''s') and (shape like 'r%' or not (shape = 'x'))"
    assert len(client.post("/search", json={"query": "ring", "k": 60, "where": where}).json()["hits"]) == 12


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "one of them"),
        ({"query": "a", "like": "b"}, "one of them"),
        ({"query": "   "}, "query"),
        ({"query": "a" * 1001}, "query"),
        ({"query": "a", "k": 0}, "k: "),
        ({"query": "a", "k": 201}, "k: "),
        ({"query": "a", "offset": -1}, "offset"),
        ({"query": "a", "size": 3}, "size"),
        ({"query": ["a"]}, "query"),
        ({"query": "a", "where": "a" * 501}, "where"),
        ([], ""),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(client: TestClient, body: Any, sentence: str) -> None:
    answer = client.post("/search", json=body)
    assert answer.status_code == 422
    assert sentence in said(answer)


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"query": "\\ud800"}', b"\xff\xfe", b"[" * 100_000, b'{"query": "a", "k": 1e999}']
)
def test_body_that_is_not_json_is_a_sentence(client: TestClient, body: bytes) -> None:
    answer = client.post("/search", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert said(answer)


def test_words_of_any_script_are_searched(client: TestClient) -> None:
    for query in ("\0", "猫", "🦄" * 500, "<script>alert(1)</script>", "a\u202eb", "'; --"):
        answer = client.post("/search", json={"query": query})
        assert answer.status_code == 200 or "knows no word" in said(answer)
    assert client.post("/search", json={"query": "a\u202eb"}).status_code == 200


# --- Images that come in


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no image", "not an image"),
        (b"", "empty"),
        (png()[:40], "truncated|damaged"),
        (bomb(60_000, 60_000), "3600.0 megapixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_bad_image_is_a_sentence(client: TestClient, data: bytes, reason: str) -> None:
    for path, field in (("/search", "image"), ("/embed", "images")):
        answer = client.post(path, files={field: ("a.png", data)})
        assert answer.status_code == 422
        assert re.search(reason, said(answer))
    answer = client.post(
        "/classify", files=[("images", ("a", data)), ("images", ("b", png()))], data={"classes": "ring"}
    )
    first, second = answer.json()["images"]
    assert re.search(reason, first["error"])
    assert first["classes"] == []
    assert second["error"] is None


def test_body_is_bounded_before_it_is_read(model: LiT, store: Store) -> None:
    small = TestClient(make_app(model, store, max_body=1 << 20), base_url="http://127.0.0.1")
    answer = small.post("/search", files={"image": ("a.png", b"a" * (2 << 20))})
    assert answer.status_code == 413
    assert "1 MB" in said(answer)

    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(3 << 10):
            yield b"a" * 1024

    for kind in ("multipart/form-data; boundary=b", "application/json"):  # neither says how long it is
        answer = small.post("/search", content=chunks(), headers={"content-type": kind})
        assert answer.status_code == 413
        assert "1 MB" in said(answer)


def test_json_is_bounded_further(client: TestClient) -> None:
    answer = client.post("/search", json={"query": "a" * (5 << 20)})
    assert answer.status_code == 413
    assert "JSON may have 4 MB" in said(answer)


def test_form_without_its_parts_is_a_sentence(client: TestClient) -> None:
    for content, kind, status in (
        (b"junk", "multipart/form-data; boundary=b", 400),
        (b"junk", "multipart/form-data", 400),
        (b"a=1", "application/x-www-form-urlencoded", 415),
        (b"{}", "", 415),
    ):
        answer = client.post("/search", content=content, headers={"content-type": kind})
        assert answer.status_code in (status, 422)
        assert said(answer)
    assert client.post("/search", files={"image": ("a.png", png())}, data={"k": "many"}).status_code == 422
    assert client.post("/search", files={"file": ("a.png", png())}).status_code == 422
    unnamed = client.post("/search", files={"image": (None, "hello")})
    assert said(unnamed) == "image: expected a file with a name, as curl -F 'image=@cat.jpg' sends it"
    many = [("images", (f"{i}.png", png())) for i in range(17)]
    assert "16" in said(client.post("/embed", files=many))


# --- Classify and embed


def test_classes_are_those_of_the_command(
    client: TestClient, model_path: Path, store: Store, image_folder: Path, tmp_path: Path
) -> None:
    [file] = image_folder.glob("large_blue_cross.*")
    templates = ["A {}.", "{}"]
    (tmp_path / "templates.txt").write_text("\n".join(templates))
    form = {"classes": CLASSES, "templates": templates}
    [sent] = client.post("/classify", files={"images": (file.name, file.read_bytes())}, data=form).json()["images"]
    names = ["--classes", ",".join(CLASSES), "--templates", tmp_path / "templates.txt"]
    [expected] = classified(model_path, file, *names)
    assert [share["name"] for share in sent["classes"]] == expected["classes"]
    assert [share["probability"] for share in sent["classes"]] == pytest.approx(expected["probabilities"], abs=1e-5)
    assert sent["none_of_these"] is None
    assert sent["name"] == file.name
    body = {"ids": [id_of(store, "large_blue_cross")], "classes": CLASSES, "templates": templates, "top": 2}
    [known] = client.post("/classify", json=body).json()["images"]
    assert len(known["classes"]) == 2
    assert known["classes"][0]["probability"] == pytest.approx(expected["probabilities"][0], abs=1e-3)  # float16 stored


def test_class_list_keeps_its_calibration(
    model: LiT, model_path: Path, store: Store, image_folder: Path, tmp_path: Path
) -> None:
    """One classes.json gives the same on the page as in `lamplit classify`: probabilities, and "none of these"."""
    files = sorted(image_folder.glob("*.*g"))[::7]
    cosines = class_list(model, CLASSES, ["A {}."]).cosines(model.encode_images(files)).amax(1)
    middle = len(cosines) // 2  # some images are near enough and some are not, and none is just at the bound
    between = float(cosines.sort().values[middle - 1 : middle + 1].mean())
    made = class_list(model, CLASSES, ["A {}."])
    classes = replace(made, logit_multiplier=3.7 * made.logit_multiplier, thresholds=[between] * len(CLASSES))
    classes.save(tmp_path / "classes.json")
    app = make_app(model, store, classes=ClassList.load(tmp_path / "classes.json"))
    client = TestClient(app, base_url="http://127.0.0.1")
    about = client.get("/about").json()
    assert about["classes"] == CLASSES
    assert about["templates"] == ["A {}."]
    assert about["calibrated"] is True

    expected = classified(model_path, *files, "--classes-file", tmp_path / "classes.json")
    sent = [("images", (file.name, file.read_bytes())) for file in files]
    for form in ({"classes": CLASSES, "templates": ["A {}."]}, {"classes": CLASSES}):
        answer = client.post("/classify", files=sent, data=form).json()["images"]
        for mine, theirs in zip(answer, expected, strict=True):
            assert [share["name"] for share in mine["classes"]] == theirs["classes"]
            shares = [share["probability"] for share in mine["classes"]]
            assert shares == pytest.approx(theirs["probabilities"], abs=1e-6)
        assert [mine["none_of_these"] for mine in answer] == [theirs["given"] == [] for theirs in expected]
        assert {mine["none_of_these"] for mine in answer} == {True, False}
    for form in ({"classes": [*CLASSES, "ring"], "templates": ["A {}."]}, {"classes": CLASSES, "templates": ["{}"]}):
        [first, *_] = client.post("/classify", files=sent, data=form).json()["images"]
        assert first["none_of_these"] is None  # nobody calibrated these


def test_multi_label_classes_are_refused(model: LiT, store: Store) -> None:
    classes = replace(class_list(model, CLASSES), thresholds=[0.1] * 3, logit_bias=-1.0)
    with pytest.raises(UsageError, match="lamplit classify does"):
        make_app(model, store, classes=classes)


def test_class_list_of_another_tower_is_refused(model: LiT, store: Store) -> None:
    with pytest.raises(TowerError, match="made for images of"):
        make_app(model, store, classes=replace(class_list(model, CLASSES), space="another"))


def test_names_are_what_the_page_begins_with(model: LiT, store: Store) -> None:
    about = TestClient(make_app(model, store, classes=["cat", "dog"]), base_url="http://127.0.0.1").get("/about").json()
    assert about["classes"] == ["cat", "dog"]
    assert about["calibrated"] is False


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ({}, "classes"),
        ({"classes": ["ring", "ring"]}, "twice"),
        ({"classes": ["ring"], "templates": ["a photo"]}, "the class name"),
        ({"classes": [str(i) for i in range(1001)]}, "classes"),
        ({"classes": [str(i) for i in range(600)], "templates": ["{}" + "a" * i for i in range(9)]}, "5000"),
    ],
)
def test_classes_that_cannot_be_meant(client: TestClient, form: dict[str, Any], sentence: str) -> None:
    answer = client.post("/classify", files={"images": ("a.png", png())}, data=form)
    assert answer.status_code == 422
    assert sentence in said(answer)


def test_every_image_is_found_by_its_id(model: LiT, store: Store, tmp_path: Path) -> None:
    names = ["a/10", "a/1", "a/2", "\u00e9", "Z", "z", "\U0001f600", "a", "\uffee", ""]
    vectors = F.normalize(torch.randn(len(names), store.tower.width))
    rows = [Row(name, "", name, [name], vector, {}) for name, vector in zip(names, vectors, strict=True)]
    named = Store.create(tmp_path / "named.lance", store.tower, rows, backend="torch")
    named.finish()
    service = Service(model, named)
    for name in names:
        row = service.row_of(name)
        assert row is not None
        assert service.item(row)["texts"] == [name]
    assert [service.row_of(name) for name in ("a/", "zz", "\U0001f601", "A")] == [None] * 4


def test_vectors_are_the_models(client: TestClient, model: LiT) -> None:
    answer = client.post("/embed", json={"texts": ["ring", "A red cross."]}).json()
    assert answer["width"] == model.width == 64
    expected = model.encode_texts(["ring", "A red cross."])
    torch.testing.assert_close(torch.tensor(answer["vectors"]), expected, atol=1e-6, rtol=0)
    answer = client.post("/embed", files=[("images", ("a", png())), ("images", ("b", png("blue")))]).json()
    expected = model.encode_images([Image.open(io.BytesIO(png(color))) for color in ("red", "blue")])
    torch.testing.assert_close(torch.tensor(answer["vectors"]), expected, atol=1e-5, rtol=0)


def test_model_without_its_image_tower_says_so(model_path: Path, store: Store) -> None:
    client = TestClient(make_app(lamplit.load(model_path, towers="text"), store), base_url="http://127.0.0.1")
    assert client.get("/about").json()["reads_images"] is False
    answer = client.post("/search", files={"image": ("a.png", png())})
    assert answer.status_code == 422
    assert "without its image tower" in said(answer)
    assert client.post("/search", json={"like": store.column("id")[0]}).status_code == 200


def test_store_of_another_tower_is_refused(model: LiT, words_path: Path) -> None:
    with pytest.raises(StoreError, match="lamplit embed"):
        make_app(model, Store(words_path))


# --- Images that go out


def test_images_go_out_encoded_again(client: TestClient, store: Store) -> None:
    for path in ("/thumbnail", "/image"):
        answer = client.get(path, params={"id": id_of(store, "small_red_ring")})
        assert answer.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(answer.content)) as image_file:
            assert (image_file.format, image_file.size) == ("JPEG", (64, 64))


@pytest.mark.parametrize(
    "name", ["", "../pairs.csv", "/etc/passwd", "..%2f..", "pairs.csv", "\0", "a" * 4096, "file:///etc/passwd", "☃"]
)
def test_no_other_file_is_ever_served(client: TestClient, name: str) -> None:
    for path in ("/thumbnail", "/image", "/item"):
        answer = client.get(path, params={"id": name})
        assert answer.status_code == 404
        assert "no image of this id" in said(answer)
    assert client.post("/search", json={"like": name}).status_code == 404
    assert client.post("/classify", json={"ids": [name], "classes": ["a"]}).status_code == 404


def test_paths_do_not_lead_out_of_the_static_files(client: TestClient) -> None:
    for path in (
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/..%2fserver.py",
        "/static//etc/passwd",
        "/x",
    ):
        answer = client.get(path)
        assert answer.status_code == 404
        assert said(answer)


def test_only_images_that_can_be_decoded_are_shown(tmp_path: Path, text_folder: Path) -> None:
    """A store may name any file of the machine; what is no image stays where it is."""
    store_path = tmp_path / "odd.lance"
    files = {"00000": tmp_path / "secret.txt", "00001": Path("/dev/zero"), "00002": tmp_path / "none.png"}
    files["00000"].write_text("secret")
    store = write_store(store_path, torch.eye(4, 8), [["<b>text</b>"]] * 4, [{"big": 2**60, "none": float("nan")}] * 4)
    rows = [lamplit_row(store, name, str(path)) for name, path in files.items()]
    store.replace(rows)
    tower = lamplit.open_text_tower(f"hf:{text_folder}", width=8)
    client = TestClient(make_app(LiT(tower, store.tower), Store(store_path)), base_url="http://127.0.0.1")
    for name, reason in {"00000": "not an image", "00001": "not a regular file", "00002": "not found"}.items():
        answer = client.get("/image", params={"id": name})
        assert answer.status_code == 404
        assert reason in said(answer)
    item = client.get("/item", params={"id": "00003"}).json()
    assert item["texts"] == ["<b>text</b>"]
    assert item["metadata"] == {"big": str(2**60), "none": None}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_whose_name_is_not_utf8_is_shown(tmp_path: Path, model: LiT, store: Store) -> None:
    (tmp_path / os.fsdecode(b"a\xff.png")).write_bytes(png())
    row = Row("a", str(tmp_path / os.fsdecode(b"a\xff.png")), "", [], torch.eye(store.tower.width)[0], {})
    Store.create(tmp_path / "a.lance", store.tower, [row], backend="torch")
    client = TestClient(make_app(model, Store(tmp_path / "a.lance")), base_url="http://127.0.0.1")
    assert client.get("/image", params={"id": "a"}).status_code == 200


def lamplit_row(store: Store, name: str, path: str) -> Any:
    [row] = [row for row in store.rows(range(len(store))) if row["id"] == name]
    metadata = {column: row[column] for column in store.metadata_columns}
    return Row(name, path, row["hash"], row["texts"], None, metadata)


# --- Who may ask, and what browsers may do with answers


def test_answers_let_browsers_load_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/docs", "/static/app.js", "/about", "/x", "/thumbnail?id=x"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_static_files_name_no_other_server() -> None:
    static = Path(lamplit.__file__).parent / "app" / "static"
    files = [file for file in static.iterdir() if file.is_file()]  # the folders are of others
    assert len(files) > 8
    for file in files:
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", file.read_text(encoding="utf-8"))
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, file.name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", file.read_text(encoding="utf-8"))
    page = (static / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script>|style=|\son\w+=", page)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:7860", "[::1]:7860", "192.168.1.7:80", "LOCALHOST", "my.pc"])
def test_known_hosts_are_answered(model: LiT, store: Store, host: str) -> None:
    client = TestClient(make_app(model, store, hosts=["My.PC"]), base_url="http://127.0.0.1")
    assert client.get("/about", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "", "[::1", "localhost.evil.example", "a b", "@"]
)
def test_other_hosts_are_refused(client: TestClient, host: str) -> None:
    answer = client.get("/about", headers={"host": host})
    assert answer.status_code == 400
    assert "address that lamplit app printed" in said(answer)


def test_reverse_proxy_of_another_name(model: LiT, store: Store) -> None:
    app = make_app(model, store, allow_hosts=["Photos.example.com", "nas.local:8443"])
    client = TestClient(app, base_url="http://127.0.0.1")
    for headers, status in (
        ({"host": "photos.example.com"}, 200),
        ({"host": "photos.example.com", "origin": "https://photos.example.com"}, 200),
        ({"origin": "https://photos.example.com"}, 200),  # a proxy that asks by the address of this server
        ({"origin": "https://nas.local:8443"}, 200),
        ({"origin": "https://nas.local"}, 403),  # another server on the same machine
        ({"origin": "https://photos.example.com:81"}, 403),
        ({"host": "nas.local", "origin": "https://photos.example.com.evil.example"}, 403),
        ({"host": "evil.example"}, 400),
    ):
        assert client.post("/search", json={"query": "ring"}, headers=headers).status_code == status, headers


@pytest.mark.parametrize("given", ["/photos", "photos/", "/photos/"])
@pytest.mark.parametrize("passed_on", ["", "/photos"])
def test_reverse_proxy_with_a_path_before_the_page(model: LiT, store: Store, given: str, passed_on: str) -> None:
    client = TestClient(make_app(model, store, root_path=given), base_url="http://127.0.0.1")
    for path in ("/", "/docs", "/static/app.js", "/about", "/openapi.json"):
        assert client.get(passed_on + path).status_code == 200, path
    assert client.post(f"{passed_on}/search", json={"query": "ring"}).status_code == 200
    assert client.get("/openapi.json").json()["servers"] == [{"url": "/photos"}]
    assert client.get("/photosynthesis").status_code == 404


def test_pages_ask_by_relative_addresses() -> None:
    for file in (Path(lamplit.__file__).parent / "app" / "static").glob("*.*"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"""(?:href|src|action)="/|(?:from|ask\(|fetch\()\s*["'`]/|return `/""", text), file.name


def test_pages_of_elsewhere_may_not_ask(client: TestClient) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://[", ""):
        answer = client.post("/search", json={"query": "a"}, headers={"origin": origin})
        assert answer.status_code == 403
        assert said(answer)
    assert client.post("/search", json={"query": "a"}, headers={"origin": "http://127.0.0.1"}).status_code == 200


# --- What is told of model, store and run


def test_about_tells_what_is_open(client: TestClient) -> None:
    about = client.get("/about").json()
    assert (about["store"], about["images"], about["reads_images"]) == ("drawings.lance", 60, True)
    columns = {column["name"]: column for column in about["columns"]}
    assert columns["shape"] == {
        "name": "shape",
        "kind": "text",
        "colours": True,
        "values": sorted(["circle", "square", "triangle", "cross", "ring"]),
    }
    assert columns["german"]["values"] == []  # too many to choose from
    assert about["details"]["store"]["width"] == 64


def test_run_of_a_model(model: LiT, store: Store, tmp_path: Path, client: TestClient) -> None:
    answer = client.get("/run")
    assert answer.status_code == 404
    assert "no finished tuning run" in said(answer)
    lines = [{"step": 0, "held_out": {"image_to_text/recall@1": 0.5}}]
    lines += [{"step": i, "loss": 1 / i, "lr": 0.1, "logit_scale": 10.0, "seconds": 1} for i in range(1, 1201)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "settings.json").write_text(json.dumps({"store": "/some/where/a.lance", "text_column": "german"}))
    (tmp_path / "report.json").write_text(json.dumps({"out": "/some/where/run", "skipped": {"a": "b"}, "steps": 1200}))
    tuned = TestClient(make_app(model, store, name=str(tmp_path)), base_url="http://127.0.0.1")
    run = tuned.get("/run").json()
    assert run["report"] == {"out": "run", "skipped": 1, "steps": 1200}
    assert run["settings"]["store"] == "a.lance"
    assert run["held_out"] == [{"step": 0, "image_to_text/recall@1": 0.5}]
    assert len(run["steps"]) == 400
    assert run["steps"][1] == {"step": 4, "loss": 0.25, "lr": 0.1, "logit_scale": 10.0}
    assert tuned.get("/about").json()["text_column"] == "german"


def test_openapi_describes_every_body(client: TestClient) -> None:
    api = client.get("/openapi.json").json()
    assert {"/search", "/classify", "/embed", "/map", "/run", "/image"} <= set(api["paths"])
    for path in ("/search", "/classify", "/embed"):
        assert set(api["paths"][path]["post"]["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert api["paths"]["/search"]["post"]["responses"]["422"]["content"]["application/json"]["schema"][
        "$ref"
    ].endswith("Problem")
    assert "openapi.json" in client.get("/docs").text


def test_cells_become_json() -> None:
    assert plain(True) is True
    assert plain(2**53) == str(2**53)
    assert plain([1.5, float("inf"), b"\xff"]) == [1.5, None, "b'\\xff'"]
    assert plain("abcdef", 4) == "abc…"


# --- The server


def test_address_is_one_that_a_browser_takes() -> None:
    assert address("127.0.0.1", 7860) == "http://127.0.0.1:7860/"
    assert address("0.0.0.0", 80) == "http://127.0.0.1:80/"
    assert address("::", 80) == "http://[::1]:80/"


def test_answers_are_sent_at_once() -> None:
    """With Nagle's algorithm every answer on a kept connection would be 40 ms late."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("package", ["uvicorn", "fastapi", "python_multipart", "prometheus_client"])
def test_missing_extra_says_what_to_type(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [name for name in sys.modules if name.startswith("lamplit.app.") and name != "lamplit.app.launch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lamplit\[app\]'"):
        lamplit.serve("model", "store.lance")


@pytest.mark.slow
def test_port_that_is_taken_is_explained(model_path: Path, store_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="another --port"):
        lamplit.serve(model_path, store_path, port=taken.getsockname()[1])


@pytest.fixture(scope="module")
def fuzzed(model: LiT, store_path: Path, model_path: Path) -> Any:
    """Open the API by its own description."""
    app = make_app(model, Store(store_path), name=str(model_path), hosts=["testserver"])  # as schemathesis calls it
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    ["/search", "/classify", "/embed", "/thumbnail", "/image", "/item", "/about", "/map", "/map/points",
     "/map/legend", "/map/colours", "/map/regions", "/map/items", "/map/area", "/run"],
)  # fmt: skip
def test_fuzzing_finds_no_server_error_and_no_answer_outside_the_description(fuzzed: Any, path: str) -> None:
    [operation] = [each.ok() for each in fuzzed.include(path=path).get_all_operations()]
    strategy = operation.as_strategy()
    if operation.body or operation.query:  # there is something to ask wrongly
        strategy |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    answered = set()

    @settings(max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def fuzz(case: Any) -> None:
        response = case.call()
        answered.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    fuzz()
    assert answered <= {200, 400, 404, 413, 415, 422}


TOKENS = """
    shape german id texts vector `shape` nope 'ring' '%' 1 -1 1e400 99999999999999999999 null true ( ) [ ] , . : ;
    = != < >= + - * / % || and or not in like ilike between is case when then end date timestamp interval
"""


@pytest.mark.slow
@settings(max_examples=600, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(TOKENS.split()), min_size=1, max_size=9).map(" ".join) | st.text(max_size=30))
def test_no_condition_breaks_the_server(client: TestClient, where: str) -> None:
    assert client.post("/search", json={"query": "ring", "where": where}).status_code in (200, 422)
