"""Speed of ChronoMoE beside transformers and a dense model of equal active size: ``python -m benchmarks.run``."""
