"""DiffFP on the device: which windows of frames changed. `api.prune` is the way in."""
