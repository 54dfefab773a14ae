"""What NVMe offload needs of a machine, found out without importing anything large.

DeepSpeed compiles its asynchronous I/O at the first start (or was installed with DS_BUILD_AIO=1), which takes libaio's
header and library, a C++ compiler, ninja and Python's headers.
"""

import importlib.util
import os
import shlex
import shutil
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PREBUILT = "deepspeed.ops.aio.async_io_op"
HEADER_FOLDERS = ("/usr/include", "/usr/local/include")
INSTALL = (
    "Debian and Ubuntu: apt-get install libaio-dev g++ ninja-build python3-dev. Red Hat: dnf install libaio-devel "
    "gcc-c++ ninja-build python3-devel. Without root: conda install -c conda-forge libaio gxx ninja, and give the folder "
    "in CFLAGS=-I... and LDFLAGS=-L..."
)


def missing_for_async_io(
    environment: Mapping[str, str] = os.environ, header_folders: Sequence[str] = HEADER_FOLDERS
) -> str | None:
    """One line on what is missing and how to get it, or None where DeepSpeed's asynchronous I/O can be built or is."""
    if _is_prebuilt():
        return None
    missing = [
        name
        for name, is_there in (
            ("libaio's header (libaio.h)", _has_header("libaio.h", [*_named_folders(environment), *header_folders])),
            (
                "a C++ compiler (g++, or the one in CXX)",
                shutil.which(environment.get("CXX", "g++"), path=environment.get("PATH")),
            ),
            ("ninja", shutil.which("ninja", path=environment.get("PATH")) or importlib.util.find_spec("ninja")),
            ("Python's header (Python.h)", _has_header("Python.h", [sysconfig.get_paths()["include"]])),
        )
        if not is_there
    ]
    if not missing:
        return None
    return f"NVMe offload needs DeepSpeed's asynchronous I/O, and this machine lacks {', '.join(missing)}. {INSTALL}"


def _is_prebuilt() -> bool:
    """Look for the compiled module as a file: importing the package above it would load torch."""
    package = importlib.util.find_spec("deepspeed")
    if package is None or package.origin is None:
        return False
    folder = Path(package.origin).parent / "ops" / "aio"
    return any(folder.glob(f"{PREBUILT.rpartition('.')[2]}*.so"))


def _named_folders(environment: Mapping[str, str]) -> list[str]:
    flags = shlex.split(f"{environment.get('CFLAGS', '')} {environment.get('CXXFLAGS', '')}")
    named = [flag[2:] for flag in flags if flag.startswith("-I")]
    for variable in ("CPATH", "CPLUS_INCLUDE_PATH", "C_INCLUDE_PATH"):
        named += [folder for folder in environment.get(variable, "").split(os.pathsep) if folder]
    conda = environment.get("CONDA_PREFIX")
    return [*named, *([f"{conda}/include"] if conda else [])]


def _has_header(name: str, folders: Iterable[str]) -> bool:
    return any((Path(folder) / name).exists() for folder in folders)
