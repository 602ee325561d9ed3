"""Makes `from ssl import DINO` work in this folder, and Python's own `ssl` as well.

A file named ssl.py hides the standard library's module from everything that runs in this folder, and much
needs it: `import torch` imports `asyncio`, which reads `ssl.SSLWantReadError` and fails. So this file loads
the standard library's ssl from the interpreter's folder and leaves *that* module in `sys.modules["ssl"]`,
which is what an import statement returns. It adds one thing, a module `__getattr__` (PEP 562): a name that
ssl lacks is looked up in `dino.py` or `relvit.py`, on first use. So asyncio, https, pip and tqdm still work,
and importing ssl does not import torch. If Python's ssl was imported before this folder was on the path, as
in a notebook, import from `dino` and `relvit` instead. The lesson: don't name a file after a standard module.
"""

import importlib.machinery
import importlib.util
import sys
import sysconfig

FILES = {"DINO": "dino", "DINOHead": "dino", "DINOLoss": "dino", "RelViT": "relvit"}

_spec = importlib.machinery.PathFinder.find_spec("ssl", [sysconfig.get_path("stdlib")])
_library = importlib.util.module_from_spec(_spec)
sys.modules["ssl"] = _library
_spec.loader.exec_module(_library)


def _lookup(name: str):
    if name not in FILES:
        raise AttributeError(f"module 'ssl' has no attribute '{name}'")
    return getattr(importlib.import_module(FILES[name]), name)


_library.__getattr__ = _lookup
