"""Cross-entropy of supervised tokens only. `api.token_nll` is the way in."""
