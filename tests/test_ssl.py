"""A file named ssl.py stands in this folder, and Python's own ssl works all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

SAME_FOLDER = "import ssl, os; print(os.path.dirname(ssl.__file__) == os.path.dirname(os.__file__))"
UNKNOWN = "import ssl\ntry: ssl.nonsense\nexcept AttributeError as e: print(e)"


@pytest.mark.parametrize(
    "code, printed",
    [
        ("import sys, ssl; print('torch' in sys.modules)", "False"),
        (SAME_FOLDER, "True"),
        ("import ssl; print(type(ssl.create_default_context()).__name__)", "SSLContext"),
        (
            "import asyncio, urllib.request as r, tqdm.auto, torch; print(r.HTTPSHandler.__name__)",
            "HTTPSHandler",
        ),
        ("import pip._internal.cli.main; import ssl; print(ssl.SSLError.__name__)", "SSLError"),
        (
            "from ssl import DINO, DINOHead, DINOLoss, SSLContext; import dino; print(DINO is dino.DINO)",
            "True",
        ),
        ("import torch; from ssl import RelViT; print(RelViT.__module__)", "relvit"),
        (UNKNOWN, "module 'ssl' has no attribute 'nonsense'"),
    ],
)
def test_a_fresh_interpreter_in_this_folder_finds_the_standard_library_and_our_methods(code, printed):
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == printed, done.stderr
