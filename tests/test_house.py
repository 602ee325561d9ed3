"""The house: a storey only looks down, and each concept file stands alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONCEPTS = "vit resnet simpool attention_priors crops ssl dino relvit lrp isnet_lrp".split()
SCRIPTS = ["train", "evaluate", "tour"]
STOREYS = [CONCEPTS, ["common"], SCRIPTS, ["experiments"]]


def names_in(source: str) -> tuple[set[str], set[str]]:
    """All modules that a source imports, `a.b` also as `from a import b`; and all names in it.

    What runs only as a script is left out: there a concept file shows its chapter.
    """
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


def test_the_root_holds_the_concepts_and_three_scripts():
    assert {path.stem for path in ROOT.glob("*.py")} == {*CONCEPTS, *SCRIPTS}


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
    assert users == {"config", "checks", "models", "runs", "regions", "foreground", "checkpoint"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONCEPTS if name not in ("resnet", "ssl")])
def test_each_chapter_runs_from_any_folder_and_draws_its_picture(name, tmp_path):
    said = subprocess.run(
        [sys.executable, ROOT / f"{name}.py"], cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / f"{name}.png").stat().st_size > 5000 and said.stdout.count(b"\n") >= 2
