"""Build Horovod 0.28.1 against the installed TensorFlow and install it.

Horovod is published as source only, and its last release predates what it has to build against:

- CMake 4 refuses the policy level of its bundled Gloo (`CMAKE_POLICY_VERSION_MINIMUM`);
- gcc 13 no longer includes `<cstdint>` and friends by itself (`-include`);
- TensorFlow 2.19 moved the XLA headers that `xla_mpi_ops.cc` includes, although all of that file's
  code is for GPUs: the guard is moved in front of the includes;
- its Gloo controller reserves a vector and then reads its size, so that the check for stalled
  ranks never fires: it resizes it instead;
- the connections of its process sets forget which network interface they were to use, and take that
  of the host's name, which on Debian is the loopback: several hosts then never find each other.

The wheel is kept in the user's cache, keyed by everything it depends on, so that the next
environment installs it in seconds.

Usage: python scripts/build_horovod.py [--constraint FILE] [--force]
"""

import argparse
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.28.1"

# (file, text as released, text as built)
PATCHES = [
    (
        "horovod/tensorflow/xla_mpi_ops.cc",
        "#if TENSORFLOW_VERSION >= 2006000000\n",
        "#if HAVE_GPU && TENSORFLOW_VERSION >= 2006000000\n",
    ),
    (
        "horovod/common/gloo/gloo_controller.cc",
        "  global_ranks_.reserve(size_);\n",
        "  global_ranks_.resize(size_);\n",
    ),
    (
        "horovod/common/gloo/gloo_context.cc",
        "  device_attr.iface = gloo_iface_;\n  device_attr.ai_family = AF_UNSPEC;\n"
        "  auto dev = CreateDevice(device_attr);\n\n  global_ctx = global_context.ctx;\n",
        "  device_attr.iface = global_context.gloo_iface_;\n"
        "  device_attr.ai_family = AF_UNSPEC;\n"
        "  auto dev = CreateDevice(device_attr);\n\n  global_ctx = global_context.ctx;\n",
    ),
]

BUILD_ENVIRONMENT = {
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
}
COMPILER_FLAGS = "-include cstdint -include stdexcept -include string"


def cache_folder() -> Path:
    """Where the wheel for this TensorFlow, Python, machine and set of patches is kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    recipe = hashlib.sha256(repr((PATCHES, BUILD_ENVIRONMENT, COMPILER_FLAGS)).encode())
    key = (
        f"horovod{VERSION}-tf{tensorflow_version()}"
        f"-py{sys.version_info.major}{sys.version_info.minor}"
        f"-{platform.system().lower()}-{platform.machine()}-{recipe.hexdigest()[:8]}"
    )
    return root / "keras_dwd" / key


def tensorflow_version() -> str:
    """Version of the TensorFlow distribution of this environment."""
    for distribution in ("tensorflow", "tensorflow-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    sys.exit("build_horovod: install TensorFlow in this environment first")


def pip(*arguments: str, **options: object) -> None:
    """Run pip of this environment; its failure ends the script."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, **options)  # type: ignore[call-overload]
    if result.returncode:
        sys.exit(f"build_horovod: failed: {' '.join(command)}")


def patch(source: Path) -> None:
    """Apply `PATCHES`; text that is not found is an error, never a silent skip."""
    for name, released, built in PATCHES:
        path = source / name
        text = path.read_text()
        if text.count(released) != 1:
            sys.exit(f"build_horovod: {name} does not hold {released!r} exactly once")
        path.write_text(text.replace(released, built))


def build(target: Path, constraint: list[str]) -> None:
    """Download, patch and build; `target` appears only when the wheel is complete."""
    if shutil.which("g++") is None and "CXX" not in os.environ:
        sys.exit("build_horovod: no C++ compiler (on Debian: apt-get install build-essential)")
    pip("install", *constraint, "setuptools", "wheel", "cmake")
    environment = BUILD_ENVIRONMENT | os.environ  # which may ask for more, such as NCCL
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["CXXFLAGS"] = f"{environment.get('CXXFLAGS', '')} {COMPILER_FLAGS}".strip()
    environment.setdefault("MAKEFLAGS", f"-j{os.cpu_count() or 1}")

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
        work = Path(folder)
        common = ("--no-deps", "--no-build-isolation")
        pip("download", *common, "--no-binary=:all:", f"--dest={work}", f"horovod=={VERSION}")
        with tarfile.open(work / f"horovod-{VERSION}.tar.gz") as archive:
            archive.extractall(work, filter="data")
        source = work / f"horovod-{VERSION}"
        patch(source)
        wheels = work / "wheels"
        pip("wheel", *common, f"--wheel-dir={wheels}", str(source), env=environment)
        shutil.rmtree(target, ignore_errors=True)
        wheels.rename(target)


def main() -> None:
    """Install from the cache, building first where needed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--constraint", help="pip constraints file")
    parser.add_argument("--force", action="store_true", help="build even if a wheel is cached")
    options = parser.parse_args()
    constraint = ["--constraint", options.constraint] if options.constraint else []

    target = cache_folder()
    if options.force or not list(target.glob("*.whl")):
        print(f"Building Horovod {VERSION} for TensorFlow {tensorflow_version()} (a few minutes)")
        build(target, constraint)
    (wheel,) = target.glob("*.whl")
    pip("install", *constraint, "--force-reinstall", "--no-deps", str(wheel))
    pip("install", *constraint, f"horovod=={VERSION}")  # what Horovod itself depends on


if __name__ == "__main__":
    main()
