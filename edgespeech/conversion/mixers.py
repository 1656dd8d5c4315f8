"""The mixers that can take attention's place: LPA, and the controls that any claim about it needs."""

from collections.abc import Callable

from flax import nnx

from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, Init, LPAConfig
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.nn.summary_mixing import SummaryMixing
from edgespeech.nn.token_mixer_controls import Removed, sliding_window

# attention, rngs -> mixer
MixerFactory = Callable[[SelfAttention | RotarySelfAttention, nnx.Rngs], nnx.Module]

# Each with the same number of pulses in all, or with none: "mean only" and "local path only" tell whether pulses do the
# work.
LPA_CONTROLS = {
    "pulses_only": LPAConfig.default,
    "mean_only": LPAConfig.mean_only,
    "local_only": LPAConfig.local_only,
    "aperiodic_only": LPAConfig.aperiodic_only,
    "runs_only": LPAConfig.runs_only,
    "periodic_only": LPAConfig.periodic_only,
    "positional_only": LPAConfig.positional_only,
    "windows_only": LPAConfig.windows_only,
}
CONTROLS = (*LPA_CONTROLS, "summary_mixing", "sliding_window", "removed")
DEFAULT_CONTROLS = ("mean_only", "local_only", "removed")


def lpa_factory(config: LPAConfig, init: Init = "attention") -> MixerFactory:
    """LPA with the attention's value and output projections, or with random ones."""
    return lambda attention, rngs: LPA.from_attention(attention, config, rngs=rngs, init=init)


def control_factory(name: str, window: int, init: Init = "attention") -> MixerFactory:
    """The control of that name.

    Args:
        name: one of `CONTROLS`.
        window: frames to each side of a query that the sliding-window control sees.
        init: of the controls that are LPAs; the others take over what they can of the attention.
    """
    if name in LPA_CONTROLS:
        return lpa_factory(LPA_CONTROLS[name](), init)
    if name == "summary_mixing":
        return lambda attention, rngs: SummaryMixing.from_attention(attention, rngs=rngs)
    if name == "sliding_window":
        return lambda attention, rngs: sliding_window(attention, window, rngs=rngs)
    if name == "removed":
        return lambda attention, rngs: Removed()
    raise ValueError(f"control {name!r} is not known: choose from {', '.join(CONTROLS)}")
