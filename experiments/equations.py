"""From equation to line: writes docs/equations.md from the numbered equations in the files' docstrings.

python -m experiments.equations
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = "vit.py resnet.py simpool.py attention_priors.py dino.py lrp.py isnet_lrp.py".split()
FILES += ["common/registration.py", "common/regions.py", "common/baselines.py"]
HEAD = """# From equation to line

Each numbered equation in the files' docstrings, the function that computes it, and the test that checks it.
Numbers are those of the papers where a file says so. `python -m experiments.equations` writes this page.
"""


def numbers(text: str) -> list[str]:
    """All equation numbers in a text: (3) gives 3, (5)-(7) and (5) to (7) give 5, 6, 7."""
    found = []
    for first, last in re.findall(r"(?<![\w)])\((\d+)\)(?:(?:-| to )\((\d+)\))?", text):
        found += [str(n) for n in range(int(first), int(last or first) + 1)]
    return found


def formulas(docstring: str) -> dict[str, str]:
    """{number: formula} of a module's docstring, up to where it says how it differs.

    A line further to the right that has no number goes on with the formula of the line before.
    """
    found, last = {}, []
    for line in docstring.split("Where we differ")[0].splitlines():
        pairs = re.findall(r"(\S.*?)\s{2,}(\(\d+\)(?:, \(\d+\))*)(?=[\s,]|$)", line)
        if line.startswith(8 * " ") and not pairs:
            found |= {n: f"{found[n].rstrip(',')}; {line.strip()}" for n in last}
        elif not line.startswith("    "):
            pairs, last = [], []
        for formula, numbered in pairs:
            last = numbers(numbered)
            for n in last:
                found[n] = f"{found[n]}; {formula}" if n in found else formula
    return found


def places(source: str) -> dict[str, tuple[str, int]]:
    """{number: (name, line)} of the function that mentions it first, or else of the first class that does."""
    classes, functions = {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for n in numbers(ast.get_docstring(node)):
                classes.setdefault(n, (node.name, node.lineno))
        for child in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(child, ast.FunctionDef):
                place = (child.name if child is node else f"{node.name}.{child.name}", child.lineno)
                for n in numbers(ast.get_source_segment(source, child)):
                    functions.setdefault(n, place)
    return classes | functions


def tested(source: str) -> dict[str, str]:
    """{number: name} of tests whose docstring begins with the equations that they check; the last counts."""
    tests = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    docs = {test.name: ast.get_docstring(test) or "" for test in tests}
    checks = {name: numbers(doc.split(".")[0]) for name, doc in docs.items() if doc.startswith("Equation")}
    return {n: name for name, found in checks.items() for n in found}


def page() -> str:
    """The text of docs/equations.md. Raises KeyError if a number lacks its line or its test."""
    parts = [HEAD]
    for file in FILES:
        source, of = (ROOT / file).read_text(), f"tests/test_{Path(file).name}"
        tree, place, tests = ast.parse(source), places(source), tested((ROOT / of).read_text())
        rows = ["| no. | equation | computed by | checked by |", "| ---: | --- | --- | --- |"]
        found = formulas(ast.get_docstring(tree, clean=False))
        for n, formula in sorted(found.items(), key=lambda e: int(e[0])):
            name, line = place[n]
            formula = formula.replace("|", "\\|")
            rows.append(f"| {n} | `{formula}` | [`{name}`](../{file}#L{line}) | `{of}::{tests.pop(n)}` |")
        if tests:
            raise KeyError(f"{file} has no equation {', '.join(tests)}")
        parts.append(f"## {file}\n\n{ast.get_docstring(tree).splitlines()[0]}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs/equations.md").write_text(page())
