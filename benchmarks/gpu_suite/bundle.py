"""Wheels for a machine that has torch and no network: made by scripts/gpu_bundle.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def environment_with(bundle: Path, site: Path) -> dict[str, str]:
    """The environment of a Python that can import gad_fast, from the bundle if it has none itself.

    The wheels go into a folder of their own, which the children search first; what is installed
    stays as it is.

    Args:
        bundle: folder of wheels.
        site: empty folder to install them in.

    Raises:
        SystemExit: the package is not installed and there is no bundle, or it does not fit.
    """
    if importlib.util.find_spec("gad_fast") is not None:
        return dict(os.environ)
    wheels = sorted(str(wheel) for wheel in bundle.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"gad_fast is not installed, and {bundle} has no wheels: make gpu-bundle")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *wheels]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"the wheels of {bundle} cannot be installed here, see above")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
