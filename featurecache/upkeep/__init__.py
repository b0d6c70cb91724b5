"""The care of a store: corrected manifests, dropping, forgetting, recomputing."""
