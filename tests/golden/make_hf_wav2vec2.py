"""Writes hf_wav2vec2.npz: what transformers computes with random weights, for machines without PyTorch.

Run from the root of the repository, with the `torch` extra: `python -m tests.golden.make_hf_wav2vec2`
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch
import transformers

TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
PADDED = [4000, 1700]  # samples of the batch that is padded
LABELS = [[7, 4, 19, 7], [11, 11, 0, 0]]
LABEL_LENGTHS = [4, 2]
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


def training_step(
    model: transformers.Wav2Vec2ForCTC, audio: np.ndarray, labels, label_lengths
) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Summed CTC loss of the model in float64, its gradients, and the parameters after one step of AdamW."""
    model = copy.deepcopy(model).double()
    logits = model(normalised(audio.astype(np.float64)).double()).logits
    loss = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1).swapaxes(0, 1),
        torch.tensor(labels),
        torch.full((len(audio),), logits.shape[1]),
        torch.tensor(label_lengths),
        reduction="sum",
    )
    loss.backward()
    # A gradient that upstream does not have (the mask embedding's) is 0.
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    # An epsilon of the gradients' size: with a small one the step is their sign, rounding included.
    torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1.0, weight_decay=0.1).step()
    stepped = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return loss.item(), gradients, stepped


def main() -> None:
    """Computes and writes the file."""
    model = random_model(width=16, heads=2, channels=8, ffn_width=24, kernel=8, groups=2)
    audio = np.random.default_rng(0).normal(0.02, 0.1, (2, 4000)).astype(np.float32)
    extractor = transformers.Wav2Vec2FeatureExtractor()  # no attention mask, as for wav2vec2-base
    rows = [normalised(row[None, :n])[0] for row, n in zip(audio, PADDED, strict=True)]
    padded = extractor.pad({"input_values": rows}, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(normalised(audio), output_hidden_states=True)
        padded_logits = model(**padded).logits
    loss, gradients, stepped = training_step(model, audio, LABELS, LABEL_LENGTHS)
    arrays = {f"tensors/{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    for kind, values in (("gradients", gradients), ("stepped", stepped)):
        arrays |= {f"{kind}/{name}": np.float32(value) for name, value in values.items()}
    np.savez_compressed(
        FILE,
        config=json.dumps(model.config.to_dict(), default=str),
        tokens=TOKENS,
        audio=audio,
        hidden=np.stack(output.hidden_states[1:]),
        logits=output.logits.numpy(),
        padded_lengths=PADDED,
        padded_logits=padded_logits.numpy(),
        labels=LABELS,
        label_lengths=LABEL_LENGTHS,
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        loss=loss,
        **arrays,
    )


if __name__ == "__main__":
    main()
