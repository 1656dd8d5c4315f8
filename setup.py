"""Packaging of edgespeech."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "edgespeech/__init__.py").read_text())[1]

# jax and flax must move together: flax 0.12.8 fails with jax >= 0.11.1, so each Python gets a pair that was tested.
# Python 3.11 ends at jax 0.10.x; on 3.12 and newer the floor is flax 0.12.12.
CORE = [
    "jax>=0.10.2,<0.11; python_version < '3.12'",
    "jax>=0.11.1,<0.13; python_version >= '3.12'",
    "flax>=0.12.8,<0.13; python_version < '3.12'",
    "flax>=0.12.12,<0.13; python_version >= '3.12'",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorflow-datasets>=4.9.10,<5",
    "importlib_resources>=6",  # used by tensorflow-datasets, which does not declare it
    "array_record>=0.8.6,<0.9",
    "jiwer>=4,<5",
    "absl-py>=2.5,<3",
    "ml_collections>=1.1,<2",
    "jaxtyping>=0.3.11,<0.4",
    "numpy>=2,<3",
    "safetensors>=0.8,<0.9",
    "soundfile>=0.14,<0.15",
    "soxr>=1.0,<2",
    "sentencepiece>=0.2.3,<0.3",
    "espeakng-loader>=0.2.4,<0.3",
    "matplotlib>=3.10,<4",
    "tensorboardX>=2.6.5,<3",
    "tqdm>=4.67,<5",
    "pyyaml>=6,<7",
    "flatbuffers>=25",  # reads .ort files; jax.export uses it and does not declare it
]
EXTRAS = {
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "tfds": ["tensorflow-cpu>=2.20"],
    "torch": [
        "torch>=2.10",
        "transformers>=5",
        "speechbrain>=1.1",
        "hyperpyyaml>=1.2",
        "ruamel.yaml>=0.18",
    ],
    "peers": [
        "torch>=2.10",
        "transformers>=5",
        "onnx>=1.23,<2",
        "onnxruntime>=1.31,<2",
        "pocketsphinx>=5.1,<6",
    ],
    "moonshine": ["moonshine-cpp==0.1.4"],  # pretrained weights, MIT
    "sweep": ["optuna>=5,<6"],
    "export": ["onnx>=1.23,<2", "onnxruntime>=1.31,<2"],
    # In a virtual environment of its own: it asks for an older typing_extensions than other extras do.
    "litert": [
        "ai-edge-litert>=2.3,<3",
        "litert-converter>=0.5,<0.6",
        "ai-edge-quantizer>=0.10,<0.11",
    ],
    "coreml": ["coremltools>=9,<10", "stablehlo-coreml>=0.1.6,<0.2"],
    "enhancement": ["pesq>=0.0.4", "pystoi>=0.4"],
    "demo": [],  # the page needs nothing more
    "mic": ["sounddevice>=0.5,<0.6"],
    "wandb": ["wandb>=0.20,<1"],
    "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0"],
    "test": [
        "pytest>=9",
        "pytest-xdist>=3.8",
        "hypothesis>=6.150",
        "ruff>=0.15,<0.18",
        "pyright[nodejs]>=1.1.400",
    ],
}

setup(
    name="edgespeech",
    version=VERSION,
    description="On-device speech recognition in JAX: LPA, early exits and the edge Conformer in one house",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["edgespeech*", "experiments*", "launch*"]),
    package_data={"edgespeech.demo": ["*.html", "*.js", "*.css"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["edgespeech=edgespeech.cli:main"]},
)
