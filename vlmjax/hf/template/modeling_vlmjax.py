"""A vision-language model that was trained with vlmjax, in torch: encode, connect, place, decode.

One file for every system: which tower, connector and decoder there are, and their details, is said
by `config.json`. The processor (`processing_vlmjax.py`) decides everything about pictures, and
hands the model, beside the tokens, for each tower e and each source k of the connector

    pixels_e     u8[B, P, 3 p p]   patches of views (pictures, frames, tiles), one after another
    segments_e   i32[B, P]         the view of each patch, 0 = padding
    coords_e     f32[B, P, 2]      where it lies
    units_k      i32[B, U, G]      the patches that become one token, or one map; -1 = none
    unit_sizes_k, unit_weights_k   of some connectors

and `source` i32[B, T]: which visual token stands at each place of the text, -1 = a word.
"""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_vlmjax import VLMJaxConfig
from .connectors_vlmjax import CONNECTORS
from .decoder_vlmjax import Decoder
from .layers_vlmjax import REDUCE, gather, put, take
from .sva_vlmjax import SVABlock
from .vision_vlmjax import TOWERS

# What `generate` calls the cache in keywords and in outputs: its name since 5.24, and before.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


class VLMJaxForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Vision towers, connector and decoder under `vision`, `connector`, `llm`."""

    config_class = VLMJaxConfig
    base_model_prefix = "vlm"
    main_input_name = "input_ids"
    _no_split_modules = ["Block", "ConvBlock", "DecoderBlock"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        for name, tower in config.towers.items():
            setattr(self, name, TOWERS[tower.type](tower))
        llm, extra = config.llm, None
        if config.towers:
            towers, cfg = [getattr(self, name) for name in config.towers], config.connector
            widths = [towers[e].out_width for e in config.sources]
            self.connector = CONNECTORS[cfg.type](cfg, widths, llm.width)
        if llm.extra_num:
            extra = nn.ModuleList(SVABlock(cfg, llm.width) for _ in range(llm.extra_num))
        self.llm = Decoder(llm, extra)
        names = [f"{n}_{e}" for e in range(len(config.towers)) for n in ("pixels", "segments")]
        names += [f"coords_{e}" for e in range(len(config.towers))]
        for k in range(len(config.sources)):
            names += [f"{n}_{k}" for n in ("units", "unit_weights", "unit_sizes")]
        names += ["source", "pool_index", "pool_weights", "routed_slots", "routed_index"]
        self.visual_names = frozenset(names)
        self.post_init()

    def _init_weights(self, module):
        """Draws weights that no checkpoint gave."""
        for name, p in module.named_parameters(recurse=False):
            if getattr(p, "_is_hf_initialized", False):
                continue
            if name in ("scale", "bias"):
                p.data.fill_(float(name == "scale"))
            else:
                p.data.normal_(std=0.02)

    def get_input_embeddings(self):
        return self.llm.embed

    def encode(self, visual):
        """Returns (visual tokens and special vectors [B, V, D], what SVA blocks read or None)."""
        for name, x in visual.items():
            if name.startswith(("coords", "unit_weights")) and x.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {x.dtype} and must stay float32: move inputs by .to(device), "
                    "without a dtype"
                )
        features = [
            getattr(self, name)(*(visual[f"{x}_{e}"] for x in ("pixels", "segments", "coords")))
            for e, name in enumerate(self.config.towers)
        ]
        sources = self.config.sources
        gathered = [gather(features[e], visual[f"units_{k}"]) for k, e in enumerate(sources)]
        x, mask = zip(*gathered, strict=True)
        weights = [visual.get(f"unit_weights_{k}") for k in range(len(sources))]
        weights = None if weights[0] is None else weights
        size = visual.get("unit_sizes_0")
        read = self.connector.sources(x, mask, weights) if self.config.llm.extra_num else None
        tokens = self.connector(x, mask, size, weights).flatten(1, 2)
        if "pool_index" in visual:
            pooled = gather(tokens, visual["pool_index"])
            tokens = REDUCE[self.config.model["pool"]](*pooled, visual["pool_weights"])
        specials = self.connector.specials(tokens)
        return torch.cat([tokens, specials.expand(len(tokens), *specials.shape)], 1), read

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        **visual,
    ):
        """Returns logits f32[B, T, V] and the cache.

        Args:
          input_ids: i64[B, T]; with a cache the new ones only.
          attention_mask: [B, S], 0 = padding, of the tokens in the cache and the new ones.
          position_ids: i64[B, T], rotary positions; None = counted by the mask.
          cache: a transformers cache.
          past_key_values: the same, as it is called before transformers 5.24.
          use_cache: whether to make one.
          logits_to_keep: of how many last tokens to return logits; 0 = of all.
          visual: see the module; where there are pictures, for their tokens' first pass only.
        """
        visual = self._visual(visual)
        B, T = input_ids.shape
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(B, past + T)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        x, routed, extra = self.llm.embed(input_ids, self.llm.dtype), None, None
        if visual:
            if past:
                raise ValueError(
                    f"pictures are given with a cache of {past} tokens; they enter with the first "
                    "tokens only: pass the cache without them, or them without the cache"
                )
            tokens, read = self.encode(visual)
            x = put(x, tokens.to(x.dtype), _longer(visual["source"], T))
            if "routed_slots" in visual:
                slots, index = visual["routed_slots"], _longer(visual["routed_index"], T)
                routed = (slots, index) if read is None else None
            if read is not None:

                def extra(block, x):
                    queries = take(x, slots)
                    new = block(queries.reshape(*read[2].shape[:2], -1, x.shape[-1]), read)
                    return put(x, new.reshape(queries.shape), index)

        hidden = self.llm(x, position_ids, attention_mask, cache, routed, extra)
        logits = self.llm.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    def _visual(self, given):
        """Returns the visual inputs among keyword arguments; refuses what it does not know."""
        asked = {k: v for k, v in given.items() if v is not None and v is not False}
        visual = {k: v for k, v in asked.items() if k in self.visual_names}
        unknown = set(asked) - set(visual) - {"return_dict"}
        if unknown:
            raise ValueError(
                f"{sorted(unknown)} are not known; the inputs of pictures are "
                f"{sorted(self.visual_names)}: take them from the processor of this directory"
            )
        return {
            k: v if v.is_floating_point() or "pixels" in k else v.long() for k, v in visual.items()
        }

    def _validate_model_kwargs(self, model_kwargs):
        super()._validate_model_kwargs(
            {k: v for k, v in model_kwargs.items() if k not in self.visual_names}
        )

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Returns the inputs of `forward`; those of pictures for the first pass only."""
        cache = kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length():
            kwargs = {k: v for k, v in kwargs.items() if k not in self.visual_names}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


def _longer(index, T):
    """Returns i64[B, T] with -1 for what follows a shorter index."""
    return nn.functional.pad(index, (0, T - index.shape[1]), value=-1)
