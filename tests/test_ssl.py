"""A file called ssl.py stands in this folder, and Python's own ssl works all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    """What a fresh interpreter prints, started in the project's folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_ssl_does_not_import_torch():
    assert python("import sys, ssl; print('torch' in sys.modules)") == "False"


def test_the_module_that_answers_is_the_standard_library_s():
    assert (
        python("import ssl, os; print(os.path.dirname(ssl.__file__) == os.path.dirname(os.__file__))")
        == "True"
    )
    assert python("import ssl; print(type(ssl.create_default_context()).__name__)") == "SSLContext"


def test_asyncio_https_tqdm_and_torch_keep_working():
    code = "import asyncio, urllib.request, tqdm.auto, torch; print(urllib.request.HTTPSHandler.__name__)"
    assert python(code) == "HTTPSHandler"
    assert python("import pip._internal.cli.main; import ssl; print(ssl.SSLError.__name__)") == "SSLError"


def test_the_doorway_hands_out_self_supervision():
    assert (
        python("from ssl import DINO, DINOHead, DINOLoss, SSLContext; import dino; print(DINO is dino.DINO)")
        == "True"
    )
    assert python("import torch; from ssl import DINO; print(DINO.__module__)") == "dino"
    assert python("from ssl import RelViT; print(RelViT.__module__)") == "relvit"


def test_a_name_that_nobody_knows_is_an_attribute_error():
    message = "module 'ssl' has no attribute 'nonsense'"
    assert message in python("import ssl\ntry: ssl.nonsense\nexcept AttributeError as e: print(e)")


@pytest.mark.parametrize(
    "file",
    "vit resnet simpool attention_priors dino relvit crops metrics phantom isnet_lrp lrp symbols".split(),
)
def test_a_concept_file_copied_alone_into_an_empty_folder_imports(file, tmp_path):
    (tmp_path / f"{file}.py").write_text((ROOT / f"{file}.py").read_text())
    code = f"import {file}; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
