"""Tokens a core-second of the tokenize stage against `tokenizers`' own `encode_batch`: see tokenize_stage.py.

    python bench/tokenize.py [--megabytes 24] [--rounds 3] [--vocab 8192]

This file has the name of a module of Python's library. A script of this folder that is run by its path has the folder
first on its path, and so the library's own `import tokenize` finds this file: it then steps aside for the real one.
"""

import importlib.util
import os
import sys

if __name__ == "__main__":
    import runpy

    folder = os.path.dirname(os.path.abspath(__file__))
    runpy.run_path(os.path.join(folder, "tokenize_stage.py"), run_name="__main__")
else:
    place = os.path.join(os.path.dirname(os.__file__), "tokenize.py")
    spec = importlib.util.spec_from_file_location("tokenize", place)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tokenize"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tokenize"])
