"""vlmjax: pretraining of vision-language models in JAX."""

__version__ = "0.1.0"
__all__ = ["from_pretrained"]


def __getattr__(name):
    # Loaded on first use, so that host processes that only make data never import jax.
    if name == "from_pretrained":
        from vlmjax.generate.chat import from_pretrained

        return from_pretrained
    raise AttributeError(f"module 'vlmjax' has no attribute {name!r}")
