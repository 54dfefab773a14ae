"""Python, the packages, the compilers and MPI: what is installed, without importing anything large."""

import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

from ds_recipes.cluster.doctor.checks import Check, Context
from ds_recipes.cluster.doctor.commands import ask
from ds_recipes.cluster.doctor.facts import code_hash, code_hashes, normalised, packages
from ds_recipes.cluster.doctor.findings import Finding, error, fine, warning

SHOWN = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "mpi4py")
OPTIONAL = {
    "flash-attn": "--attn_implementation flash_attention_2, which needs a GPU",
    "liger-kernel": "fused kernels on a GPU",
    "mpi4py": "finding rank 0 under mpirun on several hosts without MASTER_ADDR",
    "wandb": "--wandb_project",
}
INSTALL = "Run 'pip install -r requirements.txt' in the environment that the launcher starts."


def python_and_packages(context: Context) -> Iterator[Finding]:
    """What is installed against the bounds of pyproject.toml."""
    installed = packages()
    shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed)
    yield fine("versions", f"Python {sys.version.split()[0]}, {shown}")
    yield from _bounds(context.root, installed)
    missing = [f"{name} ({purpose})" for name, purpose in OPTIONAL.items() if name not in installed]
    if missing:
        yield fine("versions.optional", f"not installed, and only needed for: {'; '.join(missing)}")
    yield fine("code", f"{context.root}: hash {code_hash(code_hashes(context.root))} of ds_recipes and train.py")


def _bounds(root: Path, installed: Mapping[str, str]) -> Iterator[Finding]:
    if find_spec("packaging") is None:
        yield error(
            "package.missing",
            "the package 'packaging' is not installed, so the others' versions cannot be compared",
            "the environment is not the one that the project was installed into",
            INSTALL,
            package="packaging",
        )
        return
    from packaging.requirements import Requirement

    for text in _required(root):
        wanted = Requirement(text)
        name = normalised(wanted.name)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if name not in installed:
            yield error(
                "package.missing",
                f"{wanted.name} is not installed for {sys.executable}",
                "the environment is not active under the launcher, or the project was never installed into it",
                INSTALL,
                package=name,
            )
        elif not wanted.specifier.contains(installed[name], prereleases=True):
            yield error(
                "package.version",
                f"{wanted.name} {installed[name]} is installed, and this project needs {wanted.specifier}",
                "another program's requirements, or an older environment",
                f"Run 'pip install -U \"{text}\"'.",
                package=name,
            )


def _required(root: Path) -> list[str]:
    """The project's requirements: of pyproject.toml beside the code, else of the installed package."""
    file = root / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return list(project["dependencies"])
    try:
        return requires("ds-recipes") or []
    except PackageNotFoundError:
        return []


def compilers(context: Context) -> Iterator[Finding]:
    """C++ compiler, nvcc and ninja, and who needs them: nothing that trains with torch's AdamW does."""
    cxx = context.env.get("CXX", "g++")
    found = shutil.which(cxx.split()[0], path=context.env.get("PATH")) if cxx.split() else None
    affected = "DeepSpeed's own CPU optimizer (DeepSpeedCPUAdam), NVMe offload (async_io), torch.compile"
    untouched = "ZeRO 1 to 3, CPU offload with torch's AdamW and FSDP2 do not need one"
    if found is None:
        where = f"CXX={cxx} names no program" if "CXX" in context.env else "no g++ on the PATH"
        yield _no_compiler(where, affected, untouched)
        return
    answer = ask([*cxx.split(), "--version"])
    if not answer.good:
        yield _no_compiler(f"{found} does not work ({answer.reason})", affected, untouched)
        return
    yield fine(
        "compiler", f"{answer.output.splitlines()[0] if answer.output.strip() else found}, only needed for {affected}"
    )
    nvcc = shutil.which("nvcc", path=context.env.get("PATH"))
    if nvcc is None:
        yield fine(
            "compiler.nvcc", "no nvcc on the PATH; it is needed to build flash-attn, and for nothing in training"
        )
        return
    answer = ask([nvcc, "--version"])
    release = re.search(r"release ([\d.]+)", answer.output)
    yield fine("compiler.nvcc", f"{nvcc}: CUDA {release[1]}" if release else f"{nvcc}: {answer.reason}")


def _no_compiler(where: str, affected: str, untouched: str) -> Finding:
    return warning(
        "compiler.missing",
        f"{where}: {affected} cannot be built here",
        "no compiler is installed on this host, or its module is not loaded",
        f"Nothing to do if you use none of these: {untouched}. Else: apt-get install g++, module load gcc, or set CXX.",
    )


def mpi(context: Context) -> Iterator[Finding]:
    """mpirun, and whether mpi4py was built for the same MPI."""
    mpirun = next((path for path in map(shutil.which, ("mpirun", "mpiexec")) if path), None)
    if mpirun is None:
        yield fine("mpi.mpirun", "no mpirun on the PATH; deepspeed, torchrun and srun do not need it")
    else:
        answer = ask([mpirun, "--version"])
        first = answer.output.splitlines()[0].strip() if answer.good and answer.output.strip() else answer.reason
        yield fine("mpi.mpirun", f"{mpirun}: {first}")
    if find_spec("mpi4py") is None:
        return
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    library = ask([sys.executable, "-c", code], env=_without_mpi_rank(context.env))
    if not library.good:
        yield warning(
            "mpi.mpi4py",
            f"mpi4py cannot be imported: {library.reason}",
            "its MPI library is not on this host, or not on LD_LIBRARY_PATH",
            "Load the module of the MPI that it was built for, or set MASTER_ADDR: then nothing needs mpi4py.",
        )
        return
    theirs = library.output.splitlines()[0].strip()
    yield fine("mpi.mpi4py", f"mpi4py uses {theirs}")
    if mpirun is not None and answer.good and _family(theirs) != _family(first):
        yield warning(
            "mpi.differs",
            f"mpi4py uses {theirs}, but mpirun on the PATH is {first}",
            "mpi4py was built for another MPI than the one whose mpirun comes first on the PATH",
            "Rebuild it: pip install --no-binary mpi4py --force-reinstall mpi4py with this MPI's mpicc; or set MASTER_ADDR.",
        )


def _family(text: str) -> tuple[str, str]:
    """An MPI's name and its major version: those must be equal for ranks to find each other."""
    known = next(
        (name for name in ("Open MPI", "OpenRTE", "Intel", "MPICH", "HYDRA") if name.lower() in text.lower()), text
    )
    name = {"OpenRTE": "Open MPI", "HYDRA": "MPICH"}.get(known, known)
    number = re.search(r"(\d+)\.\d+", text)
    return name, number[1] if number and name == "Open MPI" else ""


def _without_mpi_rank(env: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a library does not take itself for this rank."""
    return {name: value for name, value in env.items() if not name.startswith(("OMPI_COMM", "PMIX_", "PMI_"))}


CHECKS = (
    Check("versions", python_and_packages),
    Check("compilers", compilers, "host", 25),
    Check("mpi", mpi, "host", 25),
)
