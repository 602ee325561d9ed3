"""A file named ssl.py stands in this folder, and Python's own ssl works all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

SNIPPETS = {  # what each prints
    "import sys, ssl; print('torch' in sys.modules)": "False",
    "import ssl, os; print(os.path.dirname(ssl.__file__) == os.path.dirname(os.__file__))": "True",
    "import ssl; print(type(ssl.create_default_context()).__name__)": "SSLContext",
    "import pip._internal.cli.main, ssl; print(ssl.SSLError.__name__)": "SSLError",
    "import asyncio, urllib.request; from ssl import DINO, DINOHead, DINOLoss, RelViT, SSLContext;"
    " import dino; print(DINO is dino.DINO, RelViT.__module__)": "True relvit",
    "import ssl\ntry: ssl.no\nexcept AttributeError as e: print(e)": "module 'ssl' has no attribute 'no'",
}


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_fresh_interpreter_in_this_folder_finds_the_standard_library_and_our_methods(code):
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == SNIPPETS[code], done.stderr
