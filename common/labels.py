"""Labels of the images in a folder: classes, or findings that are each present or not; and splits."""

import csv
import math
from pathlib import Path
from unicodedata import normalize

import torch
from torch import Tensor

from common.data import SPLITS, DataError

LABELS = {"0": 0.0, "1": 1.0, "": math.nan, "0.0": 0.0, "1.0": 1.0}  # pandas writes 1.0 beside blanks


def one_hot(classes: dict[str, str]) -> tuple[list[str], dict[str, Tensor]]:
    """The classes (K), sorted, and {image name: label (K,)} of {image name: class}."""
    findings = sorted(set(classes.values()))
    labels = dict(zip(findings, torch.eye(len(findings))))
    return findings, {name: labels[c] for name, c in classes.items()}


def notes_on(findings: list[str], labels: Tensor, train: Tensor) -> list[str]:
    """A note on findings (K) that no image for training, train (N,) bool, has by its labels (N, K)."""
    shown = (labels[train] == 1).any(dim=0).tolist()
    lacking = [f"`{finding}`" for finding, there in zip(findings, shown) if not there]
    more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
    return [f"no training image has {', '.join(lacking[:5])}{more}"] if lacking else []


def read_labels(path: Path, images: dict) -> tuple[list[str], dict[str, Tensor], dict[str, str]]:
    """Findings (K), {image name: label (K,)}, and {image name: split}, empty without a column `split`.

    images: those in the folder, by name. Raises DataError, which names the line, for what can't be read.
    """
    by_name = {normalize("NFC", name): name for name in images}  # macOS may write an umlaut as two characters
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else [b"file"]
    reader, rows = csv.reader((line.decode("utf-8-sig") for line in lines), strict=True), {}
    try:
        header = [cell.strip() for cell in next(filter(any, reader), [])]
        header = [cell.lower() if cell.lower() in ("file", "label", "split") else cell for cell in header]
        columns = [column for column in header if column not in ("file", "split", "label")]
        twice = len(set(header)) < len(header) or "label" in header and columns
        if "file" not in header or "" in header or twice:
            line = "must be `file` and either `label` or findings, each once, with commas between"
            raise ValueError(f"`{','.join(header)}` {line}")
        for cells in filter(any, reader):
            row = dict(zip(header, map(str.strip, cells)))
            if len(cells) != len(header):
                raise ValueError(f"`{cells[0]}` has {len(cells)} cells, not {len(header)}; check the commas")
            name = row["file"] if row["file"] in images else by_name.get(normalize("NFC", row["file"]))
            if name is None:
                missing = f"no `{row['file']}` in images/ itself"
                raise ValueError(f"{missing}; give the name with its suffix and no folder")
            if name in rows:
                raise ValueError(f"`{name}` is listed twice; remove one of its rows")
            if row.get("split", "train") not in SPLITS:
                raise ValueError(f"split `{row['split']}` is not train, val or test; use one of these")
            for column in columns:
                if row[column] not in LABELS:
                    raise ValueError(f"column `{column}` holds `{row[column]}`; use 0, 1 or blank")
            rows[name] = row
    except UnicodeDecodeError:
        raise DataError(f"{path}, line {reader.line_num + 1}: not UTF-8; save it as 'CSV UTF-8'") from None
    except (ValueError, csv.Error) as error:
        problem = " ".join(str(error).split())  # cells may hold newlines
        raise DataError(f"{path}, line {max(1, reader.line_num)}: {problem}") from None
    split = {name: rows[name]["split"] if name in rows else "train" for name in images if "split" in header}
    if "label" in header:
        return *one_hot({name: row["label"] for name, row in rows.items() if row["label"]}), split
    labels = {name: torch.tensor([LABELS[row[column]] for column in columns]) for name, row in rows.items()}
    return columns, labels, split
