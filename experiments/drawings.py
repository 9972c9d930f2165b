"""One small drawing for each operator, as SVG: python experiments/drawings.py writes experiments/drawings/*.svg.

Dark boxes are trained numbers, light ones copies of them, hatched ones new random numbers. White ones hold 0, or what
they say. A thick border marks what the router chooses. A second run writes the same bytes.
"""

from html import escape
from pathlib import Path

TEXT, LINE, CHOSEN = "#222222", "#555555", "#d55e00"
OLD, COPY = ("#0072b2", "#ffffff"), ("#b5daf0", TEXT)  # kinds of numbers: colours of box and text
NEW, WHITE = ("url(#hatch)", TEXT), ("#ffffff", TEXT)
DEFINITIONS = f"""<defs>
<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse"><rect width="6" height="6" fill="#ffffff"/>
<path d="M-1 1l2 -2M0 6l6 -6M5 7l2 -2" stroke="#009e73"/></pattern>
<marker id="head" viewBox="0 0 6 8" refX="4" refY="4" markerWidth="6" markerHeight="8" orient="auto"
 markerUnits="userSpaceOnUse"><path d="M0 0L6 4L0 8Z" fill="{LINE}"/></marker>
</defs>"""


def label(x, y, text, anchor="start", size=12, colour=TEXT, more=""):
    """Text on the baseline y; x is its start, middle or end."""
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{colour}"{more}>{escape(text, quote=False)}</text>'


def box(x, y, w, h, kind, text="", chosen=False):
    """A rectangle of numbers of one kind, with text in its middle."""
    fill, colour = kind
    border = f'stroke="{CHOSEN}" stroke-width="3"' if chosen else f'stroke="{LINE}"'
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" {border}/>']
    middle = (x + w / 2, y + h / 2 + 4.5, text, "middle", 12, colour)
    if text and kind == NEW:  # a white halo, so that the hatching does not cross the letters
        parts.append(label(*middle, more=' stroke="#ffffff" stroke-width="5"'))
    if text:
        parts.append(label(*middle))
    return "".join(parts)


def arrow(*points):
    """A line through x, y, x, y, ... with a head at its end."""
    path = "M" + " ".join(f"{p:g}" for p in points)
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#head)"/>'


def draw(name, heading, note, more, *elements):
    """Writes a white card with the heading above the elements and the note below. more: for readers who cannot see."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 160" width="360" height="160"',
        ' font-family="sans-serif" role="img">',
        f"<title>{escape(f'{heading}. {note} {more}', quote=False)}</title>",
        DEFINITIONS,
        '<rect x="0.5" y="0.5" width="359" height="159" rx="8" fill="#ffffff" stroke="#cccccc"/>',
        label(16, 21, heading, more=' font-weight="bold"'),
        *elements,
        label(16, 149, note),
        "</svg>",
    ]
    path = Path(__file__).with_name("drawings") / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


# ---- mixtures: experts, each under its row of the router -------------------------------------------------------------


def experts(x, width, gaps, kinds, texts, chosen):
    """gaps: the space after each; kinds: of row and expert; chosen: a text of 0 and 1."""
    for gap, (row, expert), text, mark in zip(gaps, kinds, texts, chosen):
        yield box(x, 54, width, 14, row, chosen=mark == "1")
        yield box(x, 75, width, 36, expert, text, mark == "1")
        x += width + gap


SIDE = (label(16, 66, "router"), label(16, 97, "experts"))

draw(
    "upcycle", "Upcycling: a dense MLP becomes 8 experts", "The two scores sum to 1: nothing has changed yet.",
    "Each expert is a copy of the MLP. Only the router is new. It is random, and chooses 2 experts for a token.",
    box(16, 66, 56, 40, OLD, "MLP"), arrow(82, 86, 116, 86), box(128, 32, 216, 20, NEW, "router, top-2"),
    *[box(128 + 28 * e, 70, 20, 32, COPY, str(e + 1), e in (2, 5)) for e in range(8)],
    arrow(194, 52, 194, 68), label(200, 64, "s₃"), arrow(278, 52, 278, 68), label(284, 64, "s₆"),
    label(236, 126, "s₃ MLP(x) + s₆ MLP(x) = MLP(x)", "middle"),
)  # fmt: skip
draw(
    "granularity", "Granularity: each expert is cut into G = 2", "Equal logits: chosen together. down_proj × 2.",
    "Three experts have the logits 2, 1, 3, and top-2 chooses the first and the third. Cut in two, their logits are "
    "2 2, 1 1, 3 3, and top-4 chooses both parts of the same two. Parts with equal router rows are a virtual group. "
    "Each part carries half of the score, so down_proj is multiplied by 2.",
    *SIDE, label(16, 46, "logits"), *[label(86 + 34 * i, 46, "213"[i], "middle") for i in range(3)],
    *experts(72, 28, [6] * 3, [(NEW, COPY)] * 3, "123", "101"), arrow(178, 93, 206, 93),
    *[label(223 + 23 * i - 5 * (i % 2), 46, "221133"[i], "middle") for i in range(6)],
    *experts(216, 14, [4, 14] * 3, [(NEW, COPY)] * 6, [""] * 6, "110011"),
    *[f'<path d="M{216 + 46 * i} 116v4h32v-4" fill="none" stroke="{LINE}"/>' for i in range(3)],
    label(278, 133, "virtual groups", "middle"),
)  # fmt: skip
draw(
    "more-experts", "More experts: a mixture of 4 becomes one of 8",
    "Top-2 becomes top-4: the function stays the same.",
    "Each expert is copied with its router row. Experts 1 and 3 were chosen; now both 1 and both 3 are.",
    *SIDE, label(116, 44, "top-2", "middle"), label(269, 44, "top-4", "middle"), arrow(166, 93, 188, 93),
    *experts(72, 18, [5] * 4, [(OLD, OLD)] * 4, "1234", "1010"),
    *experts(196, 13, [5, 8] * 4, [(OLD, OLD), (COPY, COPY)] * 4, "11223344", "11001100"),
)  # fmt: skip

# ---- depth: blocks over the residual stream, which each reads from and adds to ---------------------------------------


def blocks(x, *row):
    """row: (kind, text) a block; or with (kind, text) of the matrices that write, a strip at its foot."""
    yield arrow(x - 6, 124, x + 32 * len(row) - 2, 124)
    for at, (kind, text, *strip) in enumerate(row):
        at = x + 32 * at
        yield arrow(at + 5, 124, at + 5, 103)
        yield arrow(at + 21, 100, at + 21, 121)
        yield box(at, 38, 26, 62, kind, "" if strip else text)
        if strip:
            yield from (box(at, 38, 26, 42, kind, text), box(at, 80, 26, 20, *strip))


OLD_BLOCKS = (OLD, "0"), (OLD, "1"), (OLD, "2")
SMALL = (*blocks(22, *OLD_BLOCKS), arrow(120, 69, 142, 69))

draw(
    "depth-direct", "Depth, direct: the stack once more", "This is another function, and yet a good start.",
    "The layers 0 1 2 become 0 1 2 0 1 2.",
    *SMALL, *blocks(152, *OLD_BLOCKS, (COPY, "0"), (COPY, "1"), (COPY, "2")),
)  # fmt: skip
draw(
    "depth-zero", "Depth, zero: copies that add nothing yet", "o_proj and down_proj of each copy ' are 0.",
    "The layers 0 1 2 become 0 0' 1 1' 2 2'. A copy ' reads from the residual stream, but adds zeros to it.",
    *SMALL, *blocks(152, *[block for i in "012" for block in ((OLD, i), (COPY, f"{i}'", WHITE, "0"))]),
)  # fmt: skip
draw(
    "depth-random", "Depth, random: new blocks behind a mask", "A block * adds c times its output. c goes from 0 to 1.",
    "The layers 0 1 2 become 0 * 1 * 2 *. A block * is random. The mask c multiplies its o_proj and its down_proj.",
    *SMALL, *blocks(152, *[block for i in "012" for block in ((OLD, i), (NEW, "*", NEW, "c"))]),
)  # fmt: skip

# ---- width: W x becomes W' x' ----------------------------------------------------------------------------------------


def wider(matrix, reads, puts):
    """matrix: (kind, text) of the four quarters of W'; reads and puts: of the halves of x' and of W' x'."""
    yield from (box(16, 56, 52, 44, OLD, "W"), box(74, 56, 20, 44, OLD, "x"), arrow(103, 78, 129, 78))
    for i, quarter in enumerate(matrix):
        yield box(138 + 52 * (i % 2), 34 + 44 * (i // 2), 52, 44, *quarter)
    for i in range(2):
        yield from (box(250, 34 + 44 * i, 20, 44, *reads[i]), box(302, 34 + 44 * i, 40, 44, *puts[i]))
    yield label(286, 82, "=", "middle")


draw(
    "width-direct", "Width, direct: W' = [aU, (1 − a)U], U = [W; W]",
    "The shares a and 1 − a differ from entry to entry.",
    "It reads x' = [x, x]. The two shares of an entry sum to 1, so W' x' = [Wx, Wx].",
    *wider([(OLD, "aW"), (COPY, "(1−a)W"), (COPY, "aW"), (COPY, "(1−a)W")],
           [(OLD, "x"), (COPY, "x")], [(OLD, "Wx"), (COPY, "Wx")]),
)  # fmt: skip
draw(
    "width-zero", "Width, zero: W' = [[W, A], [0, C]]", "A and C read zeros: nothing has changed yet.",
    "It reads x' = [x, 0], so W' x' = [Wx, 0]. A and C are random.",
    *wider([(OLD, "W"), (NEW, "A"), (WHITE, "0"), (NEW, "C")],
           [(OLD, "x"), (WHITE, "0")], [(OLD, "Wx"), (WHITE, "0")]),
)  # fmt: skip
draw(
    "width-random", "Width, random: W' = [[W, cA], [cB, cC]]", "At c = 0 nothing has changed. c goes from 0 to 1.",
    "It reads x' = [x, 0], so W' x' = [Wx, cBx]. A, B and C are random.",
    *wider([(OLD, "W"), (NEW, "cA"), (NEW, "cB"), (NEW, "cC")],
           [(OLD, "x"), (WHITE, "0")], [(OLD, "Wx"), (NEW, "cBx")]),
)  # fmt: skip
draw(
    "learn", "Learned (LiGO): the maps B make W' out of W", "The maps are trained on text, then forgotten.",
    "W' = B_out W B_in^T. At the start a map is [I; noise]. In depth, a new layer is a learned sum of the old ones.",
    label(27, 42, "B"), label(36, 45, "out", size=9),
    box(16, 50, 44, 40, WHITE, "I"), box(16, 90, 44, 40, NEW, "noise"),
    box(72, 70, 44, 40, OLD, "W"),
    label(165, 62, "B"), label(174, 65, "in", size=9), label(174, 56, "T", size=9),
    box(128, 70, 44, 40, WHITE, "I"), box(172, 70, 44, 40, NEW, "noise"),
    label(235, 94, "=", "middle"), box(254, 50, 88, 80, COPY, "W'"),
)  # fmt: skip
