"""Draw `two-towers.svg`, the picture of the README: a locked image tower, a tuned text tower, one loss.

Run with: python docs/two_towers.py
"""

from __future__ import annotations

from pathlib import Path

OUT = Path(__file__).with_name("two-towers.svg")
WIDTH, HEIGHT = 900, 400
# A card with its own background, so that the picture reads the same on a light page and on a dark one.
PAPER, INK, MUTED, LINE = "#fbfaf7", "#1f2933", "#52606d", "#9aa5b1"
LOCKED, LOCKED_FILL = "#33658a", "#dbe7f0"
TUNED, TUNED_FILL = "#b45309", "#fdebd0"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"


def text(
    x: float, y: float, words: str, size: int = 15, color: str = INK, anchor: str = "middle", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{fill}" stroke="{stroke}" '
        'stroke-width="2"/>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float, color: str = LINE) -> str:
    marker = "tuned" if color == TUNED else "plain"
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="2.5" '
        f'marker-end="url(#{marker})"/>'
    )


def vector(x: float, y: float, color: str, label: str) -> str:
    """Draw a vector as a column of cells of different strength."""
    cells = [
        f'<rect x="{x}" y="{y + 15 * row}" width="22" height="15" fill="{color}" fill-opacity="{strength}" '
        f'stroke="{color}" stroke-width="1"/>'
        for row, strength in enumerate((0.75, 0.2, 0.5, 0.1, 0.9, 0.35))
    ]
    return "".join(cells) + text(x + 11, y + 110, label, 13, MUTED)


def padlock(x: float, y: float) -> str:
    return (
        f'<path d="M{x + 4} {y + 11} v-5 a6 6 0 0 1 12 0 v5" fill="none" stroke="{LOCKED}" stroke-width="3"/>'
        f'<rect x="{x}" y="{y + 10}" width="20" height="15" rx="3" fill="{LOCKED}"/>'
    )


def photograph(x: float, y: float) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="86" height="68" rx="5" fill="#cfe6f3" stroke="{LINE}" stroke-width="1.5"/>'
        f'<circle cx="{x + 65}" cy="{y + 18}" r="9" fill="#f2b632"/>'
        f'<path d="M{x + 1} {y + 66} l24 -34 l18 22 l14 -16 l28 28 z" fill="#6b9a5b"/>'
    )


def similarities(x: float, y: float, side: float = 32, count: int = 4) -> str:
    """Draw the matrix of cosines; pairs that belong together are on its diagonal."""
    cells = []
    for row in range(count):
        for column in range(count):
            fill = "#2f855a" if row == column else "#e4e7eb"
            cells.append(
                f'<rect x="{x + side * column}" y="{y + side * row}" width="{side - 3}" height="{side - 3}" rx="4" '
                f'fill="{fill}"/>'
            )
    return "".join(cells)


def main() -> None:
    """Write the SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{FONT}" role="img">',
        "<title>LiT: the image tower is locked, the text tower is tuned</title>",
        "<defs>",
        *(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
            for name, color in (("plain", LINE), ("tuned", TUNED))
        ),
        "</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="{PAPER}"/>',
        # the image tower
        photograph(34, 60),
        text(77, 150, "images", 14, MUTED),
        arrow(132, 94, 176, 94),
        box(186, 42, 210, 104, LOCKED_FILL, LOCKED),
        padlock(204, 58),
        text(234, 79, "image tower", 18, INK, "start", bold=True),
        text(291, 106, "any trained model", 14, MUTED),
        text(291, 127, "locked: never changes", 14, LOCKED, bold=True),
        arrow(398, 94, 442, 94),
        vector(452, 49, LOCKED, "one vector per image,"),
        text(463, 176, "computed once: the store", 13, MUTED),
        # the text tower
        box(28, 262, 112, 62, "#ffffff", LINE),
        text(84, 290, "“a mountain", 14),
        text(84, 309, "in the sun”", 14),
        text(84, 346, "captions", 14, MUTED),
        arrow(142, 293, 176, 293),
        box(186, 241, 210, 104, TUNED_FILL, TUNED),
        text(291, 277, "text tower", 18, INK, bold=True),
        text(291, 304, "any text model", 14, MUTED),
        text(291, 325, "tuned: learns to match", 14, TUNED, bold=True),
        arrow(398, 293, 442, 293),
        vector(452, 248, TUNED, "one vector per caption"),
        # the loss
        arrow(484, 94, 636, 150),
        arrow(484, 293, 636, 237),
        similarities(648, 132),
        text(774, 66, "contrastive loss", 18, INK, bold=True),
        text(774, 90, "a caption’s own image: close", 14, "#276749"),
        text(774, 110, "all other images: far", 14, MUTED),
        text(804, 198, "cosines", 14, MUTED, "start"),
        f'<path d="M712 268 C712 384, 480 390, 340 384 C304 382 291 376 291 358" fill="none" stroke="{TUNED}" '
        'stroke-width="2.5" stroke-dasharray="7 5" marker-end="url(#tuned)"/>',
        text(776, 340, "only the text tower", 14, TUNED),
        text(776, 359, "gets the gradient", 14, TUNED),
        "</svg>",
    ]
    OUT.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
