"""Packaging of ucp_deepspeed."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def stated(name: str, file: str) -> str:
    """The string that a module of the package gives a name; it isn't imported, which would need what is only to be installed."""
    found = re.search(rf'^{name} = "(.+)"', (HERE / "ucp_deepspeed" / file).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1]


VERSION = stated("__version__", "__init__.py")
OLDEST, NEWEST = (stated(name, "engine/__init__.py") for name in ("OLDEST_DEEPSPEED", "NEWEST_DEEPSPEED"))
MAJOR, MINOR = NEWEST.split(".")
DEEPSPEED_RANGE = f"deepspeed>={OLDEST},<{MAJOR}.{int(MINOR) + 1}"

HUGGING_FACE = ["transformers>=5.10,<5.11", "accelerate>=1.15,<1.16", "peft>=0.21,<0.22"]

packages = find_packages(include=["ucp_deepspeed", "ucp_deepspeed.*"])

setup(
    name="ucp-deepspeed",
    version=VERSION,
    description="Universal checkpointing for DeepSpeed and Megatron-Core: a run saved on any topology resumes on any other.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The developers of ucp_deepspeed",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*packages, "ucp_deepspeed.configs"],
    package_dir={"ucp_deepspeed": "ucp_deepspeed", "ucp_deepspeed.configs": "configs"},
    package_data={
        "ucp_deepspeed": ["py.typed"],
        "ucp_deepspeed.configs": ["*.yaml"],
        "ucp_deepspeed.testing.device": ["*.cpp"],
    },
    install_requires=[
        DEEPSPEED_RANGE,
        "torch>=2.6",
        "fsspec>=2024.6",
        "numpy>=1.26",
        "pydantic>=2.7",
        "PyYAML>=6",
        "safetensors>=0.4",
        "click>=8.1",
        "rich>=13",
        "wrapt>=1.16",
        "packaging>=23",
        "xxhash>=3.1",
    ],
    extras_require={
        "hf": HUGGING_FACE,
        "lightning": ["lightning>=2.6,<2.7"],
        "s3": ["s3fs>=2024.6"],
        "megatron": ["megatron-core>=0.16.1,<0.17"],
        "plots": ["matplotlib>=3.8"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "transformers>=5,<5.23",
            *HUGGING_FACE,
            "trl>=1,<2",
            "lightning>=2.6,<2.7",
            "torchdata>=0.11",
        ],
        "dev": ["ruff", "mypy", "pre-commit", "codespell", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["ucp = ucp_deepspeed.cli:main"]},
)
