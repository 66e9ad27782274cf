"""Every base model of the installed transformers and every LoRA option of the installed PEFT, against dense Jacobians.

``python -m benchmarks.breadth`` writes docs/reference/coverage.md.
"""
