"""Configuration of a model that was trained with vlmjax, as transformers reads it.

`config.json` holds under `model` the complete description of vision towers, connector and decoder;
the names of its entries are those of the configuration classes of vlmjax.
"""

from types import SimpleNamespace

from transformers import PretrainedConfig


class VLMJaxConfig(PretrainedConfig):
    """A vision-language model of vlmjax."""

    model_type = "vlmjax"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(self, model=None, **kwargs):
        """Makes it.

        Args:
          model: nested dicts with the keys vision (a tower, a list of them, or None), connector,
            llm, sources and pool.
        """
        self.model = model or {}
        if llm := self.model.get("llm"):
            kwargs |= {
                "vocab_size": llm["vocab"],
                "hidden_size": llm["width"],
                "num_hidden_layers": llm["layers"],
                "num_attention_heads": llm["heads"],
                "num_key_value_heads": llm["kv_heads"],
                "head_dim": llm["head_dim"],
            }
        super().__init__(**{**kwargs, "tie_word_embeddings": False})  # a tied model has no head

    @property
    def towers(self):
        """The vision towers by the name of their parameters: vision, vision_2, ..."""
        vision = self.model.get("vision")
        if vision is None:
            return {}
        vision = vision if isinstance(vision, list) else [vision]
        names = ["vision", *(f"vision_{i}" for i in range(2, len(vision) + 1))]
        return {name: SimpleNamespace(**v) for name, v in zip(names, vision, strict=True)}

    @property
    def sources(self):
        """The number of the tower that each source of the connector reads."""
        return tuple(self.model["sources"] or range(len(self.towers)))

    @property
    def connector(self):
        return self.model["connector"] and SimpleNamespace(**self.model["connector"])

    @property
    def llm(self):
        return SimpleNamespace(**self.model["llm"])
