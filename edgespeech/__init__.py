"""edgespeech: pure-functional JAX kernels and Flax modules for speech recognition on devices."""

__version__ = "0.1.0"
