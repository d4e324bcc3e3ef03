"""All metadata of the distribution; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "g2vlm/__init__.py").read_text(encoding="utf-8")).group(1)

DEPENDENCIES = [
    "torch>=2.11",
    "torchvision>=0.26",
    "transformers>=5.17,<6",
    "timm>=1.0.20",
    "safetensors>=0.5",
    "numpy>=2.0",
    "scipy>=1.14",
    "pillow>=11",
    "roma>=1.7",
    "jsonargparse>=4.49",
    "pyyaml>=6",
    "trimesh>=4.6",
]

EXTRAS = {
    "flash": ["flash-attn>=2.8"],
    "xformers": ["xformers>=0.0.35"],
    "deepspeed": ["deepspeed>=0.19"],
    "lora": ["peft>=0.19"],
    "video": ["av>=15"],
    "view": ["viser>=1.0"],
    "gguf": ["gguf>=0.17"],
    "data": ["webdataset>=1.0", "fsspec>=2025.1", "h5py>=3.12", "pyarrow>=18"],
    "log": ["tensorboard>=2.18"],
    "dev": ["pytest>=8", "pytest-xdist>=3.6", "pytest-timeout>=2.3", "ruff>=0.14", "basedpyright>=1.31"],
}

setup(
    name="g2vlm",
    version=VERSION,
    description="Geometry-grounded vision-language models: reconstruct, ask, train, supervise, evaluate",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["g2vlm", "g2vlm.*", "geometry", "geometry.*"]),
    package_data={"g2vlm": ["py.typed", "assets/**/*"], "geometry": ["py.typed"]},
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["g2vlm=g2vlm.cli:main"]},
)
