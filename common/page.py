"""Tables on the terminal, and one page for the browser (template: `page.html`).

The page is a single file that loads nothing. It shows images one by one, with each model's maps and scores.
"""

import base64
import html
import json
import math
import re
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import matplotlib
import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.data import Data
from common.measure import Report
from common.plots import COLOURS, SCALE

PNG = "data:image/png;base64,"
FINEST = 64  # cells per side of a map, so that the page stays small
WIDTH = 100  # characters of a table on the terminal


def side_by_side(reports: dict[str, Report]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The tables of runs {name: Report} joined, in percent, as text: {title: (header, rows)}."""
    joined, made = {}, {}
    for run, found in reports.items():
        prefix = f"{run}: " if len(reports) > 1 else ""
        for title, table in found.tables.items():
            joined.setdefault(title, {}).update({prefix + name: column for name, column in table.items()})
    for title, table in joined.items():
        names = list(dict.fromkeys(name for column in table.values() for name in column))
        rows = [[name, *(column.get(name, math.nan) for column in table.values())] for name in names]
        rows = [[name, *("" if math.isnan(v) else f"{100 * v:.1f}" for v in cells)] for name, *cells in rows]
        made |= {title: ([title, *table], rows)} if table else {}
    return made


def print_tables(reports: dict[str, Report]) -> None:
    """Print tables and notes of runs {name: Report}; tables wider than WIDTH are split."""
    for header, rows in side_by_side(reports).values():
        titles = [[line for part in title.split(": ") for line in wrap(part, 15)] for title in header]
        lines = [*zip_longest(*map(reversed, titles), fillvalue="")][::-1]  # a title's last line is lowest
        names, *columns = zip(*lines, *rows)
        names, parts, used = [f"{name:{max(map(len, names))}}" for name in names], [], WIDTH
        for column in columns:
            width = 2 + max(7, *map(len, column))
            if used + width > WIDTH:
                parts.append(names)
                used = len(names[0])
            parts[-1] = [f"{row}{cell:>{width}}" for row, cell in zip(parts[-1], column)]
            used += width
        print(*("\n" + "\n".join(part) for part in parts), sep="\n")
    print()
    for run, note in ((run, note) for run, found in reports.items() for note in found.notes):
        print(f"{run}: {note}" if len(reports) > 1 else note)


class Looks(NamedTuple):
    """What one run sees in the page's images."""

    maps: dict[str, Tensor]  # {title: (M, h, w)}
    relevance_for: str  # what the relevance explains; "" if the maps are attention
    said: list[list[str]]  # a classifier's decisions by image (M,); [] of an encoder
    score: str  # what the scores are, "" if there are none
    scores: list[float]  # (M,), NaN for unknown


def page(
    reports: dict[str, Report], shown: Data, which: str, looks: dict[str, Looks], curves: dict[str, Path]
) -> str:
    """The page as HTML: tables of runs {name: Report}, what runs {name: Looks} see in images, which `which`
    describes, and curves {title: PNG file}. Maps finer than FINEST are averaged.
    """
    data = {"size": list(shown.images.shape[2:]), "regions": shown.regions, "colours": COLOURS}
    data["images"] = [_image(shown, i) for i in range(len(shown.names))]
    data["runs"] = [_run(name, seen) for name, seen in looks.items()]
    notes = [f"<p>{html.escape(f'{run}: {n}')}</p>" for run, r in reports.items() for n in r.notes]
    pictures = ""
    for title, path in curves.items():
        image = f'<img class="curve" alt="{html.escape(title)}" src="{PNG}{_base64(path.read_bytes())}">'
        pictures += f'<h2>{html.escape(title)}</h2>\n<div class="wide">{image}</div>\n'
    filled = {"runs": html.escape(", ".join(looks)), "shown": html.escape(which), "curves": pictures}
    filled["tables"] = "\n".join([_table(*table) for table in side_by_side(reports).values()] + notes)
    filled["data"] = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # a name may hold </script>
    template = Path(__file__).with_name("page.html").read_text("utf-8")
    return re.sub(r"{{(\w+)}}", lambda match: filled[match[1]], template)


def _image(shown: Data, i: int) -> dict:
    Image.fromarray(shown.images[i].permute(1, 2, 0).squeeze(2).numpy()).save(file := BytesIO(), "PNG")
    masks = [_base64(np.packbits(mask)) for mask in shown.masks[i]] if shown.has_masks[i] else None
    source = PNG + _base64(file.getvalue())
    return {"name": shown.names[i], "src": source, "about": _about(shown, i), "masks": masks}


def _run(name: str, seen: Looks) -> dict:
    signed, maps = bool(seen.relevance_for), {}
    for title, m in seen.maps.items():
        m = (m if signed else m * m[0].numel()).float()  # attention 1 = uniform
        m = F.adaptive_avg_pool2d(m[:, None], [min(FINEST, side) for side in m.shape[1:]])[:, 0]
        m = m / m.abs().mean(dim=(1, 2), keepdim=True).clamp_min(1e-30) if signed else m
        maps[title.replace("\n", ", ")] = _base64(m.numpy().astype("<f4"))
    relevance = f"relevance for (red) and against (blue) {seen.relevance_for}, over its mean size:"
    colours = matplotlib.colormaps["bwr" if signed else "magma"](range(256), bytes=True)[:, :3]
    return {
        "name": name,
        "grid": list(m.shape[1:]),
        "maps": maps,
        "colours": _base64(colours),
        "unit": relevance if signed else "attention / uniform:",
        "least": -SCALE if signed else 0,
        "most": SCALE,
        "said": [", ".join(words) for words in seen.said],
        "score": seen.score,
        "scores": [None if math.isnan(score) else score for score in seen.scores],
    }


def _about(shown: Data, i: int) -> str:
    """What is known of an image's labels."""
    if shown.labels[i].isnan().all():
        return "no label."
    labels = list(zip(shown.findings, shown.labels[i].tolist()))
    present, unknown = [f for f, y in labels if y == 1], [f for f, y in labels if math.isnan(y)]
    return (", ".join(present) or "no finding") + (f" ({', '.join(unknown)}: unknown)." if unknown else ".")


def _table(header: list[str], rows: list[list[str]]) -> str:
    title, *columns = map(html.escape, header)
    lines = ["".join(f'<th scope="col">{column}</th>' for column in ["", *columns])]
    for name, *cells in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<th scope="row">{html.escape(name)}</th>{cells}')
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><caption>{title}</caption>\n{body}\n</table></div>'


def _base64(content: bytes | np.ndarray) -> str:
    return base64.b64encode(bytes(content)).decode()  # of an array, row by row
