"""The paper's experiment on real pretrained models: ``python -m benchmarks.real``."""
