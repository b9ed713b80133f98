"""Python runs this at its start where the folder is on PYTHONPATH."""

import importlib.util
import os

if os.environ.get("EMULATED_GPU") == "1" and importlib.util.find_spec("torch"):
    import emulated_gpu

    emulated_gpu.install()
