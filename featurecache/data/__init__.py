"""What comes in: manifests, targets, splits, readers, preprocessing."""
