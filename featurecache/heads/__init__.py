"""Estimators on features: one file per head, the contract and the registry in `base`."""
