"""How the fields of a dataclass become flags: limits and help are written where a field is declared."""

import argparse
import difflib
import re
from collections.abc import Iterable
from dataclasses import Field, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args


def flag(default, text: str, *names: str, group="", choices=None, nargs=None, within=None, needs=""):
    """A field that is a flag: default, help, other names, the group that begins here, choices, limits.

    needs: conditions, one of which must hold for the flag to have an effect: NAME or NAME=A|B, joined by &.
    """
    about = dict(text=text, names=names, group=group, choices=choices, nargs=nargs, within=within)
    return field(default=default, metadata=about | {"needs": needs})


def kind_of(setting: Field) -> type:
    """bool, int, float, str or Path: a field's type, or that of its items if it is a tuple."""
    return get_args(setting.type)[0] if setting.metadata["nargs"] else setting.type


def option(f: Field) -> str:
    """The flag of a field, such as --patch-size; --no-follow switches off what is on by default."""
    return "--" + ("no-" * (f.default is True) + f.name).replace("_", "-")


def may_be(setting: Field, value: Any) -> bool:
    """Whether a value, as JSON has it, has a setting's type, length and choices."""
    kind, nargs, choices = kind_of(setting), setting.metadata["nargs"], setting.metadata["choices"]
    values, types = value if nargs else [value], {float: (float, int), Path: (str,)}.get(kind, (kind,))
    if not (isinstance(values, list) and values and nargs in (None, "+", len(values))):
        return False
    return all(type(v) in types and (not choices or v in choices) for v in values)


def suggestion(word: str, known: Iterable[str]) -> str:
    """What a misspelt word may have meant, to be put after a message; "" if nothing is near."""
    near = difflib.get_close_matches(word, [*known], n=1)
    return f"; did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """A parser that suggests a flag for a misspelt one and reads --patch_size as --patch-size."""

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        dashed = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv]
        known, unknown = self.parse_known_args(dashed)
        if unknown:
            meant = suggestion(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]}{meant}")
        return known


def parser_of(settings: type, defaults: dict[str, dict], doc: str) -> Parser:
    """The parser of train.py, made from the fields of its settings. It returns only what was typed.

    defaults: what the help shows for a field whose default is None, {case: {field: value}}.
    """
    intro, examples = (doc or "\n\n").split("\n\n")[:2]
    usage = "python train.py [--task TASK] [--out DIR] [--data DIR] [flags below]"
    layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=36, width=110)
    parser = Parser("train.py", usage, intro, f"examples:\n{examples}", formatter_class=layout,
        argument_default=argparse.SUPPRESS, allow_abbrev=False)  # fmt: skip
    group = parser
    for f in fields(settings):
        about, text, kind = f.metadata, f.metadata["text"], kind_of(f)
        group = parser.add_argument_group(about["group"]) if about["group"] else group
        if kind is bool:
            group.add_argument(option(f), action="store_const", const=not f.default, dest=f.name, help=text)
            continue
        default = ", ".join(f"{key} {values[f.name]}" for key, values in defaults.items() if f.name in values)
        default = default if f.default is None else str(f.default).strip("()")
        text += f" (default: {default})" if default else ""
        metavar = None if about["choices"] else {int: "N", float: "X", Path: "PATH", str: "NAME"}[kind]
        rest = dict(type=kind, choices=about["choices"], nargs=about["nargs"], metavar=metavar, help=text)
        group.add_argument(option(f), *about["names"], **rest)
        if f.name == "out":
            what = "a run or its config.json, to repeat in another --out; other flags override it"
            group.add_argument("--config", type=Path, metavar="PATH", help=what)
    return parser
