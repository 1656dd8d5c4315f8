"""Padded batches: `upstream` is PyTorch's without an attention mask, `exact` is each utterance's alone."""

import json

import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.interop.hf_wav2vec2 import load_hf_wav2vec2, save_hf_wav2vec2
from tests.golden.hf_checkpoint import GOLDEN, IDS, write

LENGTHS = (4000, 1100, 2900)
call = nnx.jit(lambda model, audio, lengths: model(audio, lengths))


def muffled(samples, seed):
    """Noise through a low pass, with an offset: channels of little variance feel the norm's epsilon."""
    noise = np.random.default_rng(seed).normal(size=samples + 3000)
    x = np.convolve(noise, 0.99 ** np.arange(3000))[3000 : 3000 + samples]
    return np.float32(0.02 * x / x.std() + 0.01)


@pytest.fixture(scope="module")
def waves():
    return [muffled(samples, samples) for samples in LENGTHS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Their model and its folder."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_hf_wav2vec2 import random_model

    folder, theirs = tmp_path_factory.mktemp("checkpoint"), random_model()
    theirs.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(IDS))
    return theirs, folder


@pytest.fixture(scope="module")
def outputs(checkpoint, waves):
    """Of both kinds of padding, on one batch with NaN in the padding."""
    audio = np.full((len(waves), max(LENGTHS)), np.nan, np.float32)
    for row, wave in enumerate(waves):
        audio[row, : len(wave)] = wave
    return {
        padding: call(load_hf_wav2vec2(checkpoint[1], padding).model, audio, np.array(LENGTHS))
        for padding in ("exact", "upstream")
    }


def theirs_on(theirs, waves):
    """Hidden states and logits of upstream: each utterance normalised, then padded with zeros, no attention mask."""
    import torch
    import transformers

    extractor = transformers.Wav2Vec2FeatureExtractor()  # as published for wav2vec2-base
    assert not extractor.return_attention_mask
    rows = [extractor(wave, sampling_rate=16_000).input_values[0] for wave in waves]
    batch = extractor.pad({"input_values": rows}, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = theirs(**batch, output_hidden_states=True)
    return [*(h.numpy() for h in output.hidden_states[1:]), output.logits.numpy()]


def test_upstream_is_parity_on_a_padded_batch(checkpoint, waves, outputs):
    output = outputs["upstream"]
    wanted = theirs_on(checkpoint[0], waves)
    found = [*output.hidden, output.logits]
    assert len(found) == len(wanted) == 3
    for layer, (ours, theirs) in enumerate(zip(found, wanted, strict=True), 1):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4, err_msg=f"layer {layer}")
    np.testing.assert_array_equal(output.lengths, [12, 3, 8])  # of the utterances, as in exact
    np.testing.assert_array_equal(outputs["exact"].lengths, output.lengths)


def test_exact_is_the_unpadded_utterance_and_not_upstream(checkpoint, waves, outputs):
    exact, upstream = outputs["exact"], outputs["upstream"]
    for row, n in enumerate(exact.lengths):
        *_, alone = theirs_on(checkpoint[0], [waves[row]])
        assert alone.shape[1] == n
        np.testing.assert_allclose(exact.logits[row, :n], alone[0], rtol=0, atol=1e-4)
    differ = np.abs(exact.logits - upstream.logits)
    assert differ[0].max() < 1e-4  # the longest has no padding
    for row in (1, 2):
        assert differ[row, : exact.lengths[row]].max() > 0.05


def test_golden_padded_batch(tmp_path):
    """What upstream's padding does, without PyTorch at hand; the longest row shows it in neither."""
    audio, lengths = GOLDEN["audio"], GOLDEN["padded_lengths"]
    folder, logits = write(tmp_path), GOLDEN["padded_logits"]
    upstream = call(load_hf_wav2vec2(folder, "upstream").model, audio, lengths)
    np.testing.assert_allclose(upstream.logits, logits, rtol=0, atol=1e-5)
    exact = call(load_hf_wav2vec2(folder).model, audio, lengths)
    np.testing.assert_allclose(exact.logits[0], logits[0], rtol=0, atol=1e-5)
    n = int(exact.lengths[1])
    assert np.abs(exact.logits[1, :n] - logits[1, :n]).max() > 0.01


def test_upstream_needs_a_normalised_waveform(tmp_path):
    folder = write(tmp_path, processor={"do_normalize": False})
    assert load_hf_wav2vec2(folder).model.config.padding == "exact"
    with pytest.raises(InputError, match=r"do_normalize=false, .*choose 'exact'"):
        load_hf_wav2vec2(folder, "upstream")


@pytest.mark.parametrize(("padding", "masked"), [("exact", True), ("upstream", False)])
def test_what_is_written_says_whether_a_mask_is_needed(tmp_path, padding, masked):
    loaded = load_hf_wav2vec2(write(tmp_path), padding)
    save_hf_wav2vec2(tmp_path / "saved", loaded.model, loaded.tokenizer)
    processor = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert processor["return_attention_mask"] is masked
