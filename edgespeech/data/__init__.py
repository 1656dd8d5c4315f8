"""Speech corpora, tokenizers and batches, in numpy: nothing in this package imports JAX.

Import from the modules: `corpus`, `audio`, `folder`, `synthetic`, `tfds_source`, `sources`,
`tokenizer`, `batching`.
"""
