"""Build the wheel, install it where the source tree is out of sight, import every module in it and start the command.

The clean environment borrows third-party packages from the environment that runs this file (a second copy of torch
would cost minutes), but not its editable install of layerwise: a folder named in a ``.pth`` file goes on the path
without its own ``.pth`` files being read.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheel"

# Run by the clean environment: the modules' names are its arguments, its own folder of packages comes first.
IMPORT_ALL = """
import importlib, pathlib, sys
home, *names = sys.argv[1:]
for name in names:
    module = importlib.import_module(name)
    if not pathlib.Path(module.__file__).is_relative_to(home):
        sys.exit(f"{name} was imported from {module.__file__}, not from the wheel in {home}")
print(f"wheel: {len(names)} modules imported")
"""


def build_wheel() -> Path:
    """Build from a copy without stale ``build/lib``, which setuptools would pack again; return the wheel's path."""
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(WORK), str(ROOT)]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if built.returncode:
        sys.exit(f"the wheel could not be built:\n{built.stdout}")
    (wheel,) = WORK.glob("*.whl")
    return wheel


def expected_files() -> set[str]:
    """Return what the wheel must hold, by the names there: every source, stub and data file under the four folders."""
    folders = {
        "layerwise": "layerwise",
        "server": "layerwise/server",
        "worker": "layerwise/worker",
        "proto": "layerwise/proto",
    }
    found: set[str] = set()
    for folder, package in folders.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def main() -> None:
    """Check the wheel, or exit with a sentence that says what is wrong with it."""
    wheel = build_wheel()
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    missing, surplus = expected_files() - packed, packed - expected_files()
    if missing or surplus:
        sys.exit(
            f"the wheel and the source tree differ: not in the wheel {sorted(missing)}, "
            f"only in the wheel {sorted(surplus)}; mend [tool.setuptools] packages or package-data in pyproject.toml"
        )
    home = WORK / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in packed if name.endswith(".py")
    )
    arguments = [
        str(python),
        "-I",
        "-c",
        IMPORT_ALL,
        str(site),
        *(name for name in modules if not name.endswith("__main__")),
    ]
    if subprocess.run(arguments, cwd=WORK, check=False).returncode:
        sys.exit("a module of the wheel could not be imported outside of the source tree")
    if subprocess.run(
        [home / "bin" / "layerwise", "--help"], cwd=WORK, stdout=subprocess.DEVNULL, check=False
    ).returncode:
        sys.exit("the command `layerwise` of the wheel does not start")


if __name__ == "__main__":
    main()
