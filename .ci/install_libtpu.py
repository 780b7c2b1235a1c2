"""Install the TPU's compiler that this JAX asks for beside the environment, in sys.prefix/libtpu.

Not in it: a JAX that sees the plugin looks for a TPU at every start and complains on standard error.
"""

import platform
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

if sys.platform == "linux" and platform.machine() == "x86_64":  # there are no other builds
    wanted = next(line.partition(";")[0] for line in requires("jax") or [] if line.startswith("libtpu"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*install, "--target", str(Path(sys.prefix) / "libtpu"), wanted], check=True)
