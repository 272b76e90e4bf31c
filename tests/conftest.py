"""Shared test set-up; the folder itself is importable (`import hf_reference`)."""
