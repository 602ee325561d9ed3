"""What was found, for people: tables on the terminal, and one page for a browser.

The page (`page.html` is its template) stands alone: pictures, maps and numbers lie in it, nothing is loaded
from anywhere, and it can be sent as one file. One moves in it over images, heads, thresholds and models; the
images that a model is worst at are among them, and come first if asked for. Next to read: `look.py`.
"""

import base64
import html
import json
import math
import re
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.data import Data
from common.measure import Report
from common.metrics import known_mean
from common.plots import COLOURS, SCALE

FINEST = 64  # cells a side of a map in the page, so that it stays small enough to send


def side_by_side(reports: dict[str, Report]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The tables of runs {name: Report} joined, in percent: {title: (header, rows)}, all of it text."""
    columns: dict[str, dict[str, dict[str, float]]] = {}
    for run, found in reports.items():
        before = f"{run}: " if len(reports) > 1 else ""
        for title, table in found.tables.items():
            columns.setdefault(title, {}).update({before + what: row for what, row in table.items()})
    made = {}
    for title, table in columns.items():
        names = list(dict.fromkeys(name for column in table.values() for name in column))
        rows = [[name, *(column.get(name, math.nan) for column in table.values())] for name in names]
        if title in ("AP in %", "Dice in %"):
            rows.append(["mean", *(known_mean(column.values()) for column in table.values())])
        rows = [[name, *("" if math.isnan(v) else f"{100 * v:.1f}" for v in cells)] for name, *cells in rows]
        made |= {title: ([title, *table], rows)} if table else {}
    return made


def print_tables(reports: dict[str, Report]) -> None:
    """Print what was found of runs {name: Report}, and what could not be."""
    for header, rows in side_by_side(reports).values():
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        widths[1:] = [max(7, width) for width in widths[1:]]
        print()
        for name, *cells in [header, *rows]:
            print(f"{name:{widths[0]}}" + "".join(f"  {c:>{width}}" for c, width in zip(cells, widths[1:])))
    print()
    for run, found in reports.items():
        for note in found.notes:
            print(f"{run}: {note}" if len(reports) > 1 else note)


class Looks(NamedTuple):
    """What one run sees in the images of the page."""

    maps: dict[str, Tensor]  # {title: (M, h, w)}
    relevance_for: str  # what the relevance is for; "" if the maps are attention
    said: list[list[str]]  # what a classifier says of each image (M,); of an encoder, nothing
    score: str  # what the scores are, "" if there are none
    scores: list[float]  # (M,), the worst the lowest, NaN for unknown


def page(
    reports: dict[str, Report], shown: Data, which: str, looks: dict[str, Looks], curves: dict[str, Path]
) -> str:
    """The page: figures of runs {name: Report}, what they see in images, and pictures {what they show: file}.

    which: says what images are shown. looks: {name: Looks}; maps finer than FINEST are averaged.
    """
    masks = shown.masks if shown.masks is not None else torch.zeros(len(shown.names), 0)
    about = {
        "size": list(shown.images.shape[2:]),
        "regions": shown.regions,
        "colours": COLOURS,
        "images": [
            {
                "name": name,
                "src": f"data:image/png;base64,{_png(shown.images[i])}",
                "about": _said(shown, i),
                "masks": [_packed(mask) for mask in masks[i]] if shown.has_masks[i] else None,
            }
            for i, name in enumerate(shown.names)
        ],
        "runs": [_looks_of(name, seen) for name, seen in looks.items()],
    }
    tables = [_table(*table) for table in side_by_side(reports).values()]
    notes = [f"<p>{html.escape(run)}: {html.escape(n)}</p>" for run, r in reports.items() for n in r.notes]
    pictures = [
        f'<h2>{html.escape(what)}</h2>\n<div class="wide"><img class="curve" alt="{html.escape(what)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></div>'
        for what, path in curves.items()
    ]
    template = (Path(__file__).parent / "page.html").read_text("utf-8")
    filled = {
        "runs": html.escape(", ".join(looks)),
        "shown": html.escape(which),
        "tables": "\n".join(tables + notes),
        "curves": "\n".join(pictures),
        "data": json.dumps(about, allow_nan=False).replace("<", "\\u003c"),  # a name may hold </script>
    }
    return re.sub(r"{{(\w+)}}", lambda match: filled[match[1]], template)


def _looks_of(name: str, seen: Looks) -> dict:
    maps = {title.replace("\n", ", "): m for title, m in seen.maps.items()}
    h, w = (min(FINEST, side) for side in next(iter(maps.values())).shape[1:])
    signed, laid = bool(seen.relevance_for), {}
    for title, m in maps.items():
        m = (m if signed else m * m[0].numel()).float()  # 1 = uniform
        m = F.adaptive_avg_pool2d(m[:, None], (h, w))[:, 0]
        laid[title] = m / m.abs().mean(dim=(1, 2), keepdim=True).clamp_min(1e-30) if signed else m
    colours = matplotlib.colormaps["bwr" if signed else "magma"](np.arange(256), bytes=True)[:, :3]
    relevance = f"relevance for (red) and against (blue) {seen.relevance_for}, over its mean size:"
    return {
        "name": name,
        "grid": [h, w],
        "maps": {title: _text(m.numpy().astype("<f4")) for title, m in laid.items()},
        "colours": _text(colours),
        "unit": relevance if signed else "attention / uniform:",
        "least": -SCALE if signed else 0,
        "most": SCALE,
        "said": [", ".join(words) for words in seen.said],
        "score": seen.score,
        "scores": [None if math.isnan(score) else score for score in seen.scores],
    }


def _said(shown: Data, i: int) -> str:
    """What is known of an image's labels, as words."""
    if shown.labels is None or shown.labels[i].isnan().all():
        return "no label."
    labels = list(zip(shown.findings, shown.labels[i].tolist()))
    present, unknown = [f for f, y in labels if y == 1], [f for f, y in labels if math.isnan(y)]
    return (", ".join(present) or "no finding") + (f" ({', '.join(unknown)}: unknown)." if unknown else ".")


def _table(header: list[str], rows: list[list[str]]) -> str:
    first, *others = map(html.escape, header)
    head = '<th scope="col"></th>' + "".join(f'<th scope="col">{cell}</th>' for cell in others)
    body = ""
    for row in rows:
        name, *cells = map(html.escape, row)
        body += f'\n<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f'<div class="wide"><table><caption>{first}</caption>\n<tr>{head}</tr>{body}\n</table></div>'


def _png(image: Tensor) -> str:
    """An image (1 or 3, H, W) uint8 as a PNG."""
    file = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _packed(mask: Tensor) -> str:
    """A mask (H, W), a bit a pixel, row by row."""
    return _text(np.packbits(mask.numpy().ravel()))


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
