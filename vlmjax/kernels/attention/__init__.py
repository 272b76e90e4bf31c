"""Attention inside segments of packed rows. `api.plan` and `api.attention` are the way in."""
