"""What `import edgespeech.nn` loads: numpy, jax, flax and what these load, and nothing of data or training."""

import json
import subprocess
import sys

# Packages of data, training, evaluation and export, and of other frameworks.
FORBIDDEN = {
    "array_record",
    "espeakng_loader",
    "grain",
    "jiwer",
    "matplotlib",
    "ml_collections",
    "onnx",
    "onnxruntime",
    "optax",
    "orbax",
    "pandas",
    "safetensors",
    "scipy",
    "sentencepiece",
    "soundfile",
    "soxr",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tensorstore",
    "torch",
    "tqdm",
    "transformers",
}
OURS_ALONE = {"", "errors", "nn", "ops", "types"}


def loaded_by(statement):
    """Names of the modules that a new process has loaded after a statement."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(json.loads(out.stdout))


def packages(modules):
    return {name.split(".")[0] for name in modules}


def test_nn_loads_no_data_or_training_package():
    loaded = loaded_by("import edgespeech.nn")
    parts = {
        name.removeprefix("edgespeech").removeprefix(".").split(".")[0]
        for name in loaded
        if name.startswith("edgespeech")
    }
    assert parts == OURS_ALONE
    # Flax's own NNX loads optax; nothing of ours does.
    of_flax = packages(loaded_by("from flax import nnx"))
    assert packages(loaded) & FORBIDDEN <= of_flax & {"optax"}
    assert packages(loaded) - of_flax <= {"edgespeech", "jaxtyping", "wadler_lindig"}


def test_bare_functions_need_no_flax():
    loaded = loaded_by(
        "from edgespeech.ops import accumulate, causal_accumulate, conv, norm, pulse, softmax"
    )
    assert not packages(loaded) & (FORBIDDEN | {"flax"})
    assert "edgespeech.nn" not in loaded
