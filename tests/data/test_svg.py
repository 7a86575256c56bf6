"""SVGs from anybody: what is drawn, and what is refused or left out."""

from __future__ import annotations

import base64
import gzip
import io
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from lamplit import errors
from lamplit.data.decoding import svg, svg_drawer
from lamplit.data.decoding.images import decode_image
from lamplit.data.decoding.svg import is_svg, rewrite_svg
from lamplit.errors import ImageError

pytest.importorskip("resvg_py")

RED = '<rect width="5" height="10" fill="red"/>'  # the left half of the drawing
NOTHING = "nothing of the SVG can be seen on white (text and references to other files are not drawn)"


def drawing(content: str = RED, attributes: str = 'width="10" height="10"', before: str = "") -> bytes:
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"{before}<svg {spaces} {attributes}>{content}</svg>".encode()


def encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def reason(data: bytes, **bounds: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **bounds)
    return str(caught.value)


def is_half_red(data: bytes) -> bool:
    """Tell whether it shows what `RED` draws, and nothing else."""
    image = decode_image(data)
    expected = torch.full_like(image, 255)
    expected[1:, :, : image.shape[2] // 2] = 0
    return torch.equal(image, expected)


def test_svg_is_drawn_on_white() -> None:
    assert is_half_red(drawing())
    public = '"-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd"'
    assert is_half_red(drawing(before=f'\ufeff<?xml version="1.0"?><!-- a > b --><!DOCTYPE svg PUBLIC {public}>'))
    latin = drawing("<title>é</title>" + RED, before='<?xml version="1.0" encoding="ISO-8859-1"?>')
    assert is_half_red(latin.decode().encode("latin-1"))
    assert is_half_red(drawing(f"<style>rect {{ opacity: 1 }}</style>{RED}<text x='1' y='5'>A &lt; B</text>"))


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ('width="1e9" height="1e9" viewBox="0 0 10 10"', (512, 512)),
        ('width="9pt" height="0.25in"', (512, 256)),
        ('viewBox="0,0,20,10" width="100%"', (256, 512)),
        ('viewBox="0 0 10 20" height="8"', (512, 256)),
        ('width="1e8" height="4e8"', (512, 128)),
        ('width="60"', (256, 512)),
    ],
)
def test_size(attributes: str, shape: tuple[int, int]) -> None:
    whole = '<rect width="100%" height="100%" fill="red"/>'
    image = decode_image(drawing(whole, attributes))
    assert image.shape == (3, *shape)
    assert image[0].min() == 255
    assert image[1].max() == 0


def test_all_of_a_drawing_without_a_size_is_shown() -> None:
    content = RED + '<rect x="5" width="5" height="10" fill="white"/><rect x="700" y="500" width="100" height="100"/>'
    image = decode_image(drawing(content, ""))
    assert image.shape == (3, 600, 800)
    assert image[:, 550, 750].tolist() == [0, 0, 0]
    far = '<rect x="1e6" y="1e6" width="9" height="9"/>'
    assert re.match("damaged SVG|SVG cannot be drawn", reason(drawing(RED + far, "")))


@pytest.mark.parametrize("attributes", ['width="0" height="0"', 'width="1e999" height="1"', 'viewBox="0 0 inf 1"'])
def test_no_size(attributes: str) -> None:
    assert reason(drawing(RED, attributes)) == "SVG without a size"


def test_other_files_are_not_read(tmp_path) -> None:
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    (tmp_path / "a.svg").write_bytes(drawing('<rect width="10" height="10"/>'))
    inner = base64.b64encode(drawing(f'<image width="9" height="9" href="{tmp_path}/a.png"/>')).decode()
    addresses = (f"{tmp_path}/a.png", f"file://{tmp_path}/a.png", f"{tmp_path}/a.svg", "http://127.0.0.1:9/a.png")
    for address in (*addresses, f"data:image/svg+xml;base64,{inner}", f"{tmp_path}/a.svg#a", "data:image/png;base64,é"):
        for image in ('<image width="10" height="10" href="{}"/>', '<image width="10" height="10" xlink:href="{}"/>'):
            assert is_half_red(drawing(RED + image.format(address))), address
        assert is_half_red(drawing(f'{RED}<use href="{address}"/>'))
        assert is_half_red(drawing(RED, before=f'<?xml-stylesheet href="{address}"?>'))
    assert reason(drawing(f'<image width="10" height="10" href="{tmp_path}/a.png"/>')) == NOTHING
    prefixed = f'<s:image xmlns:s="http://www.w3.org/2000/svg" width="9" height="9" href="{tmp_path}/a.png"/>'
    assert is_half_red(drawing(RED + prefixed))
    styled = f'<filter id="f"><feImage href="{tmp_path}/a.png"/></filter><g filter="url(#f)"><rect width="9"/></g>'
    assert is_half_red(drawing(RED + styled))


def test_images_inside_are_drawn_within_bounds() -> None:
    image = '<image width="10" height="10" href="data:image/png;base64,{}"/>'
    assert decode_image(drawing(image.format(encoded(Image.new("RGB", (9, 9), "blue")))))[:, 9, 9].tolist() == [
        0,
        0,
        255,
    ]
    large = drawing(RED + image.format(encoded(Image.new("1", (1000, 1000)))))
    assert reason(large, max_pixels=999_999) == "SVG with images of more pixels than the bound"


def test_scripts_are_left_out() -> None:
    script = "<script>while (true);</script><foreignObject><p>x<b/></p></foreignObject>"
    assert is_half_red(drawing(script + RED, 'width="10" height="10" onload="x()"'))
    written = rewrite_svg(drawing(script + RED, 'width="10" height="10" onload="x()"'), 1)
    assert "while" not in written
    assert "<b" not in written
    assert "x()" not in written


def test_entities_are_refused() -> None:
    expected = "SVG that declares entities is not read; save it as plain SVG"
    laughs = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "ha"}">' for i in range(10))
    for declared in (laughs, '<!ENTITY a9 SYSTEM "file:///etc/hostname">', '<!ENTITY % a9 "x">'):
        assert reason(drawing(RED + "<text>&a9;</text>", before=f"<!DOCTYPE svg [{declared}]>")) == expected


def test_explosions_end() -> None:
    uses = "".join(f'<g id="a{i}">' + f'<use href="#a{i - 1}"/>' * 10 + "</g>" for i in range(1, 9))
    assert reason(drawing(f'<g id="a0">{RED}</g>{uses}<use href="#a8"/>')).startswith("damaged SVG")
    assert reason(drawing('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>')).startswith("damaged SVG")
    assert reason(drawing("<g>" * 50_000 + "</g>" * 50_000)) == "SVG of elements in each other, more than 200 deep"
    assert reason(drawing("<g/>" * 100_001)) == "SVG of more than 100,000 elements"
    assert reason(drawing("<g>" + " " * svg.MAX_BYTES + "</g>")) == "SVG of 16 MiB, more than the bound of 16"
    assert is_half_red(drawing("<g>" * 150 + RED + "</g>" * 150))


def test_time_is_bounded(monkeypatch) -> None:
    """Patterns in patterns: every level is drawn ten times by the next."""
    monkeypatch.setattr(svg, "MAX_SECONDS", 0.7)
    patterns = "".join(
        f'<pattern id="p{i}" width="10" height="10" patternUnits="userSpaceOnUse">'
        + "".join(f'<rect x="{x}" width="1" height="1" fill="url(#p{i - 1})"/>' for x in range(10))
        + "</pattern>"
        for i in range(1, 9)
    )
    slow = drawing(
        f'<pattern id="p0" width="1" height="1">{RED}</pattern>{patterns}<rect width="9" height="9" fill="url(#p8)"/>'
    )
    assert reason(slow) == "SVG cannot be drawn in 10 s and 2 GiB of memory"
    monkeypatch.undo()
    assert is_half_red(drawing()), "the next one is drawn again"


def test_interrupted_drawing_is_not_taken_for_the_next(monkeypatch) -> None:
    def interrupted(_stream: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(svg_drawer, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_image(drawing('<rect width="10" height="10"/>'))
    monkeypatch.undo()
    assert is_half_red(drawing())


def test_threads_get_their_own_drawings() -> None:
    colours = [f"#{red:02x}0000" for red in range(0, 250, 10)]
    with ThreadPoolExecutor(8) as pool:
        whole = '<rect width="10" height="10" fill="{}"/>'
        images = list(pool.map(lambda colour: decode_image(drawing(whole.format(colour))), colours))
    assert [int(image[0, 9, 9]) for image in images] == list(range(0, 250, 10))


def test_what_is_no_drawing_says_so() -> None:
    assert reason(drawing("")) == NOTHING
    assert reason(drawing('<text x="1" y="9">Text</text>')) == NOTHING, "it would look as the machine's fonts do"
    assert reason(b"<svg>").startswith("damaged SVG (no element found")
    assert reason(drawing("<title>é</title>").decode().encode("latin-1")).startswith("damaged SVG (not well-formed")
    assert reason(drawing("<x:g/>")).startswith("damaged SVG (")
    assert reason(drawing(before='<?xml version="1.0" encoding="klingon"?>')).startswith(
        "damaged SVG (unknown encoding"
    )
    assert reason(b"<html><svg/></html>") == "not an image"
    assert reason(b"<svg></svgs>").startswith("damaged SVG (mismatched tag")
    assert reason(drawing().decode().encode("utf-16")) == "not an image"
    assert reason(gzip.compress(drawing())) == "a compressed file (.svgz, .gz) is not read; decompress it"
    assert is_svg(b'\n <a:svg xmlns:a="http://www.w3.org/2000/svg"/>')
    assert is_svg(b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "]"> ]>' + b"<!-- > -->" * 5000 + b"<svg>")
    assert not is_svg(b"\xff\xd8\xff a JPEG that holds <svg/>")
    assert not is_svg(b"<!DOCTYPE html><html><svg/></html>")
    assert not is_svg(b"<!-- -->" * 5000 + b"<!-- <svg>"), "in a moment"


def test_without_the_extra(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(errors, "import_module", missing)
    assert reason(drawing()) == "SVG is not read: resvg_py is not installed; type: pip install 'lamplit[svg]'"
