"""The house: a storey only looks down, and each concept file stands alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONCEPTS = "vit resnet simpool attention_priors crops ssl dino relvit lrp isnet_lrp".split()
SCRIPTS = ["train", "evaluate"]
STOREYS = [CONCEPTS, ["common"], SCRIPTS, ["experiments"]]


def imported(path: Path) -> set[str]:
    """The top-level names of all modules that a file imports at any place, by their first part."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_the_root_holds_the_concepts_and_the_two_scripts():
    assert {path.stem for path in ROOT.glob("*.py")} == {*CONCEPTS, *SCRIPTS}


@pytest.mark.parametrize("storey", range(len(STOREYS)))
def test_a_storey_imports_only_itself_and_what_lies_below(storey):
    above = {name for names in STOREYS[storey + 1 :] for name in names}
    beside = set(STOREYS[storey]) if STOREYS[storey] in (CONCEPTS, SCRIPTS) else set()
    for name in STOREYS[storey]:
        files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else (ROOT / name).glob("*.py")
        for path in files:
            assert not imported(path) & (above | beside - {name}), path


def test_each_concept_file_alone_in_an_empty_folder_imports(tmp_path):
    names = [name for name in CONCEPTS if name != "ssl"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    code = f"import sys\nfor name in {names}: sys.path[0] = name; __import__(name); del sys.modules[name]"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_no_file_but_the_config_s_users_sees_all_settings():
    """Functions take the values that they need, so that a reader sees what they depend on."""
    allowed = {"config.py", "checks.py", "models.py", "runs.py", "checkpoint.py"}  # make, check, use and store them
    users = {path.name for path in (ROOT / "common").glob("*.py") if "Config" in path.read_text()}
    assert users <= allowed
