"""A doorway, not a room: `from ssl import DINO` works here, and so does Python's own `ssl`.

A file called ssl.py hides the standard library's module of that name from everything that runs in this
folder, and much needs it: `import torch` imports `asyncio`, which asks for `ssl.SSLWantReadError`, and dies.
So this file loads the standard library's ssl from the interpreter's own folder, leaves *that* module in
`sys.modules["ssl"]` (what an import statement hands out is whatever lies there when the file has run), and
gives it one addition, a module `__getattr__` (PEP 562): a name that ssl does not know is looked up in
`dino.py` or `relvit.py`, on first use. So asyncio, https, pip and tqdm never notice, and importing ssl does
not import torch. The lesson: don't name a file like a standard module; if you must, step aside. Next to read:
`phantom.py`.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import sysconfig

ROOMS = {"DINO": "dino", "DINOHead": "dino", "DINOLoss": "dino", "RelViT": "relvit"}

_spec = importlib.machinery.PathFinder.find_spec("ssl", [sysconfig.get_path("stdlib")])
_library = importlib.util.module_from_spec(_spec)
sys.modules["ssl"] = _library
_spec.loader.exec_module(_library)


def _lookup(name: str):
    if name not in ROOMS:
        raise AttributeError(f"module 'ssl' has no attribute '{name}'")
    return getattr(importlib.import_module(ROOMS[name]), name)


_library.__getattr__ = _lookup
