"""Build Horovod 0.28.1 against the installed TensorFlow and install it.

Horovod is published as source only, and its last release needs these changes to build and run:

- CMake 4 rejects the policy version of the bundled Gloo: `CMAKE_POLICY_VERSION_MINIMUM` is set.
- gcc 13 no longer includes `<cstdint>` and similar headers implicitly: `-include` adds them.
- TensorFlow 2.19 moved XLA headers that `xla_mpi_ops.cc` includes. As all code of that file is for
  GPUs, its preprocessor guard is extended to the includes.
- The Gloo controller reserves a vector and then uses its size, so the check for stalled ranks
  never fires: the vector is resized instead.
- The connections of process sets ignore the chosen network interface and use that of the host
  name, which is the loopback on Debian, so that hosts cannot connect: the interface is passed on.

The wheel is cached for each combination of versions and patches, so that the next environment
installs it in seconds.

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

# (file, released text, replacement)
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
    """Cache folder of the wheel for this TensorFlow, Python, machine and set of patches."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    recipe = hashlib.sha256(repr((PATCHES, BUILD_ENVIRONMENT, COMPILER_FLAGS)).encode())
    key = (
        f"horovod{VERSION}-tf{tensorflow_version()}"
        f"-py{sys.version_info.major}{sys.version_info.minor}"
        f"-{platform.system().lower()}-{platform.machine()}-{recipe.hexdigest()[:8]}"
    )
    return root / "keras_dwd" / key


def tensorflow_version() -> str:
    """Version of the TensorFlow installed in this environment."""
    for distribution in ("tensorflow", "tensorflow-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    sys.exit("build_horovod: install TensorFlow in this environment first")


def pip(*arguments: str, **options: object) -> None:
    """Run this environment's pip; exit if it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, **options)  # type: ignore[call-overload]
    if result.returncode:
        sys.exit(f"build_horovod: failed: {' '.join(command)}")


def patch(source: Path) -> None:
    """Apply `PATCHES`; exit if a text to replace is not in its file exactly once."""
    for name, released, built in PATCHES:
        path = source / name
        text = path.read_text()
        if text.count(released) != 1:
            sys.exit(f"build_horovod: {name} does not hold {released!r} exactly once")
        path.write_text(text.replace(released, built))


def build(target: Path, constraint: list[str]) -> None:
    """Download, patch and build; `target` is created only when the wheel is complete."""
    if shutil.which("g++") is None and "CXX" not in os.environ:
        sys.exit("build_horovod: no C++ compiler (on Debian: apt-get install build-essential)")
    pip("install", *constraint, "setuptools", "wheel", "cmake")
    environment = BUILD_ENVIRONMENT | os.environ  # the user's variables win, for example for NCCL
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
    """Install the wheel from the cache; build it first if it is not there."""
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
    pip("install", *constraint, f"horovod=={VERSION}")  # the dependencies of Horovod


if __name__ == "__main__":
    main()
