"""Writes hf_wav2vec2.npz: what transformers computes with random weights, for machines without PyTorch.

Run from the root of the repository, with the `torch` extra: `python -m tests.golden.make_hf_wav2vec2`
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
FILE = Path(__file__).with_name("hf_wav2vec2.npz")


def random_model(
    *, width=32, heads=4, layers=2, channels=32, ffn_width=64, kernel=16, groups=4, norm_first=False
) -> transformers.Wav2Vec2ForCTC:
    """A `Wav2Vec2ForCTC` whose every parameter counts: no bias is 0, no scale is 1, no gain is its direction's norm."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(TOKENS),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn_width,
        conv_dim=(channels,) * 7,
        num_conv_pos_embeddings=kernel,
        num_conv_pos_embedding_groups=groups,
        do_stable_layer_norm=norm_first,
        initializer_range=1.5 * width**-0.5,
    )
    model = transformers.Wav2Vec2ForCTC(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif parameter.shape[:2] == (1, 1):
                parameter *= 0.5 + torch.rand_like(parameter)
    return model


def normalised(audio: np.ndarray) -> torch.Tensor:
    """Audio `[b t]` as upstream's feature extractor passes it to the model."""
    extractor = transformers.Wav2Vec2FeatureExtractor()
    return extractor(list(audio), sampling_rate=16_000, return_tensors="pt").input_values


def main() -> None:
    """Computes and writes the file."""
    model = random_model(width=16, heads=2, channels=8, ffn_width=24, kernel=8, groups=2)
    audio = np.random.default_rng(0).normal(0.02, 0.1, (2, 4000)).astype(np.float32)
    with torch.no_grad():
        output = model(normalised(audio), output_hidden_states=True)
    arrays = {f"tensors/{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez_compressed(
        FILE,
        config=json.dumps(model.config.to_dict(), default=str),
        tokens=TOKENS,
        audio=audio,
        hidden=np.stack(output.hidden_states[1:]),
        logits=output.logits.numpy(),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        **arrays,
    )


if __name__ == "__main__":
    main()
