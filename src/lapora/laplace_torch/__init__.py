"""The one room that knows laplace-torch and its backends, ASDL and curvlinops.

``engines`` runs their Kronecker factors over an adapter; ``kron_laplace`` hands an adapter's posterior to
laplace-torch's own classes. Everything here works on layers and tensors: what a saved posterior is, is known
one level up, by :mod:`lapora.interop`.
"""

from lapora.laplace_torch.engines import asdl_factors, curvlinops_factors

__all__ = ["asdl_factors", "curvlinops_factors"]
