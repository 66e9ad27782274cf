"""Every base model of the installed transformers and every LoRA option of the installed PEFT, against dense Jacobians.

``python -m benchmarks.breadth`` writes docs/reference/coverage.md.
"""

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a check by CUDA itself forbids forks
