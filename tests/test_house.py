"""The house: a storey only looks down, each concept file stands alone, and the tour runs."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = ["train", "evaluate", "tour"]
CONCEPTS = sorted({path.stem for path in ROOT.glob("*.py")} - {*SCRIPTS})
STOREYS = [CONCEPTS, ["common"], SCRIPTS, ["experiments"]]


def names_in(source: str) -> tuple[set[str], set[str]]:
    """A source's modules, `a.b` also as `from a import b`, and names; not of what runs only as a script."""
    modules, names, tree = set(), set(), ast.parse(source)
    script = "__name__ == '__main__'"
    tree.body = [node for node in tree.body if ast.unparse(getattr(node, "test", node)) != script]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        names |= {getattr(node, field, None) for field in ("id", "attr", "name", "arg")}
    return modules, names


@pytest.mark.parametrize("storey", range(3))
def test_a_storey_imports_only_itself_and_what_lies_below(storey):
    above = {name for names in STOREYS[storey + 1 :] for name in names}
    beside = set(STOREYS[storey]) if STOREYS[storey] in (CONCEPTS, SCRIPTS) else set()
    for name in STOREYS[storey]:
        for path in [ROOT / f"{name}.py", *(ROOT / name).glob("*.py")]:
            modules, _ = names_in(path.read_text() if path.exists() else "")
            assert not {module.split(".")[0] for module in modules} & (above | beside - {name}), path


def test_each_concept_file_alone_in_an_empty_folder_imports(tmp_path):
    names = [name for name in CONCEPTS if name != "ssl"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    code = f"import sys\nfor name in {names}: sys.path[0] = name; __import__(name); del sys.modules[name]"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_no_file_but_the_config_s_users_sees_all_settings():
    """Functions take the values that they need, so that a reader sees what they depend on."""
    users = set()
    for path in [*(ROOT / "common").glob("*.py"), *(ROOT / f"{name}.py" for name in CONCEPTS)]:
        modules, names = names_in(path.read_text())
        if "common.config" in modules or {"Config", "config"} & names:
            users.add(path.stem)
    assert users == {"config", "checks", "models", "runs", "foreground", "checkpoint"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONCEPTS if name not in ("resnet", "ssl")])
def test_each_chapter_runs_from_any_folder_and_draws_its_picture(name, tmp_path):
    command = sys.executable, ROOT / f"{name}.py"
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / f"{name}.png").stat().st_size > 5000 and said.stdout.count(b"\n") >= 2


SNIPPETS = {  # what each prints
    "import sys, ssl; print('torch' in sys.modules)": "False",
    "import pip._internal.cli.main, ssl; print(ssl.SSLError.__name__)": "SSLError",
    "import asyncio, urllib.request; from ssl import DINO, DINOHead, DINOLoss, RelViT, SSLContext;"
    " import dino; print(DINO is dino.DINO, RelViT.__module__)": "True relvit",
    "import sys; here = sys.path.pop(0); import ssl; sys.path[:0] = [here]; import train; print(1)": "1",
    "import ssl\ntry: ssl.no\nexcept AttributeError as e: print(e)": "module 'ssl' has no attribute 'no'",
}


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_fresh_interpreter_in_this_folder_finds_the_standard_library_and_our_methods(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == SNIPPETS[code], done.stderr


def test_the_tour_fits_on_two_screens_and_has_no_flag():
    text = (ROOT / "tour.py").read_text()
    assert len(text.splitlines()) <= 150 and "argparse" not in text and "sys.argv" not in text


@pytest.mark.slow
def test_a_shortened_tour_prints_each_figure_and_draws_its_picture(tmp_path, monkeypatch, capsys):
    text = (ROOT / "tour.py").read_text()
    shorter = {"GRID = 200": "GRID = 2", "phantom(800": "phantom(32", "phantom(300": "phantom(16"}
    for long, short in shorter.items():
        assert long in text
        text = text.replace(long, short)
    text = re.sub(r"train\((\S+), (600|900)", r"train(\1, 3", text)
    (tmp_path / "tour.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: None)  # other tests go on in this process
    names = runpy.run_path("tour.py")
    said = capsys.readouterr().out
    assert said.count("average precision: left lung") == said.count("plain classifier, AUC") == 1
    assert (tmp_path / "tour.png").exists() and len(names["heat"]) == 2
