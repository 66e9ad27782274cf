"""Directions in logit space whose gradients make up the Fisher.

The Fisher of one example is ``J_nᵀ M_n J_n``, and any columns ``S_n`` with ``S_n S_nᵀ = M_n`` serve: their
gradients are what the curvature is summed from. Source: Laplace-LoRA (Yang et al. 2024), Eq. 8;
for softmax the Fisher is the generalised Gauss-Newton matrix (Martens 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor


def exact_columns(logits: Tensor) -> Tensor:
    """Columns of the Hessian's factor: ``S Sᵀ = diag(p) - p pᵀ``, with C-1 columns instead of C.

    With ``R_k = Σ_{j>=k} p_j``, column k is ``sqrt(p_k R_{k+1} / R_k) (e_k - Σ_{j>k} (p_j / R_{k+1}) e_j)``.
    Tail sums and their logarithms are taken in log space, so that saturated probabilities lose no digits.

    Args:
        logits: ``(B, C)``.

    Returns:
        ``(C-1, B, C)``, in float64.
    """
    log_p = torch.log_softmax(logits.double(), dim=1)
    classes = log_p.shape[1]
    # log R_k for k = 0..C-1: a cumulative log-sum-exp from the end.
    log_tail = torch.logcumsumexp(log_p.flip(1), dim=1).flip(1)
    columns = log_p.new_zeros(classes - 1, *log_p.shape)
    for k in range(classes - 1):
        size = (0.5 * (log_p[:, k] + log_tail[:, k + 1] - log_tail[:, k])).exp()
        columns[k, :, k] = size
        share = (log_p[:, k + 1 :] - log_tail[:, k + 1 : k + 2]).exp()
        columns[k, :, k + 1 :] = -size.unsqueeze(1) * share
    return columns


def monte_carlo_columns(logits: Tensor, uniform: Tensor) -> Tensor:
    """One column per example: the score ``e_y - p`` of a label drawn from the model.

    Args:
        logits: ``(B, C)``.
        uniform: ``(B,)`` numbers of [0, 1), one for each row: the label is where the cumulated p passes it.

    Returns:
        ``(1, B, C)``, in float64; its outer product equals ``diag(p) - p pᵀ`` in expectation.
    """
    p = torch.softmax(logits.double(), dim=1)
    passed = p.cumsum(dim=1) <= uniform.to(p).unsqueeze(1)
    return empirical_columns(logits, passed.sum(dim=1).clamp(max=p.shape[1] - 1))


def empirical_columns(logits: Tensor, labels: Tensor) -> Tensor:
    """One column per example: the score ``e_y - p`` of its own label.

    Args:
        logits: ``(B, C)``.
        labels: ``(B,)`` int64.

    Returns:
        ``(1, B, C)``, in float64.
    """
    p = torch.softmax(logits.double(), dim=1)
    return (torch.nn.functional.one_hot(labels, p.shape[1]).to(p) - p).unsqueeze(0)


def difference_columns(logits: Tensor) -> Tensor:
    """The C-1 differences ``f_c - f_0``: all that softmax can see.

    Returns:
        ``(C-1, B, C)``.
    """
    return class_columns(logits)[1:] - class_columns(logits)[:1]


def class_columns(logits: Tensor) -> Tensor:
    """One direction per class.

    Returns:
        ``(C, B, C)``.
    """
    batch, classes = logits.shape
    identity = torch.eye(classes, dtype=logits.dtype, device=logits.device)
    return identity.unsqueeze(1).expand(classes, batch, classes)


def no_columns(logits: Tensor) -> Tensor:
    """No direction at all: the forward pass is enough.

    Returns:
        ``(0, B, C)``.
    """
    return logits.new_zeros(0, *logits.shape)
