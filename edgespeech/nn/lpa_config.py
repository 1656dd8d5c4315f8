"""The size and shape of an LPA mixer, with the presets that its claims are measured by."""

from dataclasses import dataclass, replace

from edgespeech.errors import InputError
from edgespeech.ops import pulse

READOUTS = ("static", "content")


@dataclass(frozen=True)
class LPAConfig:
    """Size and shape of an LPA mixer. All values are ours.

    Attributes:
        aperiodic: content-placed rectangles per head.
        runs: run-form pulses per head (each run of open gates is averaged on its own).
        periodic: periodic windows per head.
        positional: windows over the position in the utterance, per head.
        mean: all-ones gates per head.
        octaves: lengths, each twice the one before, of windows around each frame; 0: none. See `ops.relative`.
        taps: single frames to each side before the first of those windows.
        kernel_size: odd; frames that the depthwise convolution in front of the content gates sees.
        local: whether the local path `lambda DWConv(v)` is there.
        local_kernel_size: odd; frames that the local path sees.
        min_width: least width of a rectangle in frames, at least 1 so that none falls between two.
        max_period: longest period in frames; periods are log-spaced from 2.
        num_basis: cosines of a positional window.
        readout: "static", one weight alpha per pulse, or "content",
            `alpha_pi = alpha_p (1 + tanh(linear(z_i)_p))`, which starts equal to static.

    Raises:
        InputError: a value is out of range.
    """

    aperiodic: int = 8
    runs: int = 0
    periodic: int = 4
    positional: int = 4
    mean: int = 0
    octaves: int = 0
    taps: int = 3
    kernel_size: int = 15
    local: bool = True
    local_kernel_size: int = 15
    min_width: float = 2.0
    max_period: float = 256.0
    num_basis: int = 16
    readout: str = "static"

    def __post_init__(self):
        def require(name: str, is_right: bool, limit: str):
            if not is_right:
                raise InputError(f"LPAConfig.{name} is {getattr(self, name)!r}; it must be {limit}")

        for name in ("aperiodic", "runs", "periodic", "positional", "mean", "octaves", "taps"):
            require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("kernel_size", "local_kernel_size"):
            value = getattr(self, name)
            require(name, value >= 1 and value % 2 == 1, "odd and at least 1")
        require("min_width", self.min_width >= 1, "at least 1 frame")
        require("max_period", self.max_period >= pulse.MIN_PERIOD, "at least 2 frames")
        require("num_basis", self.num_basis >= 1, "at least 1")
        require("readout", self.readout in READOUTS, f"one of {', '.join(READOUTS)}")
        has_others = self.num_pulses + self.octaves > 0
        require("local", self.local or has_others, "True where no pulses are configured")

    @property
    def num_pulses(self) -> int:
        """Pulses of all kinds per head, p."""
        return self.aperiodic + self.runs + self.periodic + self.positional + self.mean

    @classmethod
    def default(cls) -> "LPAConfig":
        """8 rectangles, 4 periodic and 4 positional pulses per head."""
        return cls()

    @classmethod
    def windows(cls) -> "LPAConfig":
        """The default's pulses, and four octaves of windows around each frame: 17 windows."""
        return cls(octaves=4)

    @classmethod
    def windows_only(cls) -> "LPAConfig":
        """Control: the windows around each frame and the local path."""
        return replace(cls._only(), octaves=4)

    @classmethod
    def _only(
        cls,
        aperiodic: int = 0,
        runs: int = 0,
        periodic: int = 0,
        positional: int = 0,
        mean: int = 0,
    ) -> "LPAConfig":
        return cls(aperiodic, runs, periodic, positional, mean)

    @classmethod
    def mean_only(cls) -> "LPAConfig":
        """Control: 16 all-ones gates and the local path, in the manner of SummaryMixing.

        The 16 are alike and act as one; they keep the number of readout weights that others have.
        """
        return cls._only(mean=16)

    @classmethod
    def local_only(cls) -> "LPAConfig":
        """Control: the local path without any pulse."""
        return cls._only()

    @classmethod
    def aperiodic_only(cls) -> "LPAConfig":
        """Control: 16 rectangles per head."""
        return cls._only(aperiodic=16)

    @classmethod
    def runs_only(cls) -> "LPAConfig":
        """Control: 16 run-form pulses per head."""
        return cls._only(runs=16)

    @classmethod
    def periodic_only(cls) -> "LPAConfig":
        """Control: 16 periodic pulses per head."""
        return cls._only(periodic=16)

    @classmethod
    def positional_only(cls) -> "LPAConfig":
        """Control: 16 positional pulses per head."""
        return cls._only(positional=16)
