"""The objective of speech enhancement."""

from flax import nnx

from edgespeech.ops.sisnr import si_snr_loss
from edgespeech.training.state import LossFunction


def si_snr_objective(graphdef: nnx.GraphDef) -> LossFunction:
    """The loss of a SepFormer on a `MixtureBatch`: see `si_snr_loss`."""

    def loss(params, batch, key, step):
        del key, step
        model = nnx.merge(graphdef, params, copy=True)
        estimates = model(batch.audio, batch.audio_lengths).estimates
        return si_snr_loss(estimates, batch.targets, batch.audio_lengths, batch.weights), {}

    return loss
