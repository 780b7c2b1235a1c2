"""Print the newest Python that runs here, from PATH or held by pyenv; an error if none is newer than this one."""

import glob
import os
import re
import subprocess
import sys

folders = os.environ["PATH"].split(os.pathsep)
folders += glob.glob(os.path.join(os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv")), "versions", "*", "bin"))
found = {}
for folder in folders:
    for program in glob.glob(os.path.join(folder, "python3.*")):
        if re.fullmatch(r"python3\.\d+", os.path.basename(program)):
            # A pyenv shim is there whether or not its Python is, so each is asked.
            said = subprocess.run(
                [program, "-c", "import ensurepip, sys; print(*sys.version_info[:3])"], capture_output=True, text=True
            )
            if said.returncode == 0:
                found.setdefault(tuple(map(int, said.stdout.split())), program)
newest = max(found, default=sys.version_info[:3])
if newest <= sys.version_info[:3]:
    sys.exit(f"no Python newer than {'.'.join(map(str, sys.version_info[:3]))} on PATH or held by pyenv")
print(found[newest])
