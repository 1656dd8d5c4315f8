"""From a trained model to text: decoding with caches, and transcription of recordings."""
