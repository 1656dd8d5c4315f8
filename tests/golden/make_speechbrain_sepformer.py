"""Writes speechbrain_sepformer.npz: what SpeechBrain's separation of two computes with random weights, without PyTorch.

Run from the root of the repository, with the `torch` extra: `python -m tests.golden.make_speechbrain_sepformer`
"""

import dataclasses
import importlib.metadata
from pathlib import Path

import numpy as np
import torch

from edgespeech.evaluation.latency_sepformer import importable_torchaudio, random_speechbrain_model
from tests.support.sepformer import SMALL

FILE = Path(__file__).with_name("speechbrain_sepformer.npz")


def random_model(config):
    """Theirs with random weights: no scale is 1, no bias is 0."""
    model = random_speechbrain_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def two_voices(speakers: int) -> tuple[np.ndarray, np.ndarray]:
    """Mixture `[2 t]` and its voices `[2 spk t]`, of whole frames."""
    rng, t = np.random.default_rng(1), 8 + 4 * 29
    targets = np.float32(rng.normal(size=(2, speakers, t)))
    return targets.sum(1) + np.float32(0.5 * rng.normal(size=(2, t))), targets


def training_step(model, loss, mix, targets) -> dict[str, np.ndarray]:
    """Masks `[b spk n f]`, estimates `[b spk t]`, their permutation-invariant loss, gradients by our names' theirs."""
    given = torch.tensor(mix)
    masks = model.masknet(model.encoder(given)).detach().numpy()  # [spk b f n]
    estimates = model(given)  # [b t spk]
    # The loss writes into its inputs.
    value = loss(torch.tensor(targets).transpose(1, 2).clone(), estimates.clone()).mean()
    value.backward()
    return {
        "masks": masks.transpose(1, 0, 3, 2),
        "estimates": estimates.detach().numpy().swapaxes(1, 2),
        "loss": value.item(),
        **{f"gradients/{name}": gradient for name, gradient in _gradients(model).items()},
    }


def _gradients(model) -> dict[str, np.ndarray]:
    """1x1 convolutions as matrices, and the fused projection in its three parts."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        if name.startswith("masknet.") and gradient.ndim > 2:
            gradient = gradient.reshape(gradient.shape[:2])
        if "att.in_proj_" in name:
            for part, value in zip("qkv", np.split(gradient, 3), strict=True):
                gradients[name.replace("in_proj_", f"{part}_proj.")] = value
        else:
            gradients[name] = gradient
    return gradients


def main() -> None:
    """Computes and writes the file."""
    with importable_torchaudio():
        from speechbrain.nnet.losses import get_si_snr_with_pitwrapper
    model = random_model(dataclasses.replace(SMALL, num_speakers=2))
    mix, targets = two_voices(2)
    np.savez_compressed(
        FILE,
        mix=mix,
        targets=targets,
        versions=f"torch {torch.__version__}, speechbrain {importlib.metadata.version('speechbrain')}",
        **training_step(model, get_si_snr_with_pitwrapper, mix, targets),
        **{
            f"tensors/{name}": tensor.numpy()
            for name, tensor in model.state_dict().items()
            if not name.endswith(".pos_enc.pe")
        },
    )


if __name__ == "__main__":
    main()
