"""A toy edge Conformer and its tokenizer, for tests of streams."""

import dataclasses

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.models.edge_conformer_config import EdgeConformerConfig

TOKENIZER = CharTokenizer(["<pad>", "|", "A", "B", "C"])
TOY = dataclasses.replace(
    EdgeConformerConfig.tiny(),
    vocab_size=5,
    num_mels=11,
    width=8,
    num_layers=1,
    num_heads=2,
    ffn_width=8,
    conv_kernel=5,
    chunk=3,
    left=1,
)
