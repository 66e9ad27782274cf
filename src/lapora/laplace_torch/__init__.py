"""Interface to laplace-torch and its backends, ASDL and curvlinops; the only package that imports them.

``engines`` computes their Kronecker factors for an adapter; ``kron_laplace`` converts curvature to and from
laplace-torch's classes. The package works on layers and tensors; :mod:`lapora.interop` handles saved posteriors.
"""

from lapora.laplace_torch.engines import asdl_factors, curvlinops_factors

__all__ = ["asdl_factors", "curvlinops_factors"]
