"""Connectors against classes of transformers with random weights."""

import hf_reference  # noqa: F401, before transformers
import numpy as np
import torch
from by_hand import close, flat, gather, load, run, whole, windows
from transformers import Idefics2Config, InternVLConfig, LlavaConfig, VipLlavaConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

from vlmjax.connectors import MLPConfig, PerceiverConfig
from vlmjax.hf import connectors as tables

TOLERANCE, OUT = 2e-5, 16


def _reference(model):
    """A torch module with every parameter random, and its weights."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(p.data + 0.2 * torch.randn(p.shape, generator=generator))
    return model.eval(), {k: v.numpy() for k, v in model.state_dict().items()}


def _features(*shape):
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def _vit(layers=2):
    return dict(hidden_size=6, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2)


TEXT = dict(model_type="llama", hidden_size=OUT, intermediate_size=12, num_attention_heads=2)


def _load_mlp(cfg, in_widths, layout, weights):
    return load(tables.abstract("mlp", cfg, in_widths, OUT), layout, weights)


def test_llava_against_transformers():
    vision = dict(model_type="clip_vision_model", **_vit())
    config = LlavaConfig(vision_config=vision, text_config=TEXT)
    reference, weights = _reference(LlavaMultiModalProjector(config))
    module, x = _load_mlp(MLPConfig(), (6,), "llava", weights), _features(2, 5, 6)
    theirs = reference(torch.tensor(x)).detach().numpy()
    close(flat(run(module, *((v,) for v in gather(x, windows(1, 5, 1))))), theirs, TOLERANCE)


def test_vipllava_against_transformers():
    """Layers of the tower are sources of the connector."""
    vision = dict(model_type="clip_vision_model", **_vit())
    layers = [-2, -5, 3]
    config = VipLlavaConfig(vision_config=vision, text_config=TEXT, vision_feature_layers=layers)
    reference, weights = _reference(VipLlavaMultiModalProjector(config))
    module, x = _load_mlp(MLPConfig(norm="layer"), (6,) * 3, "llava", weights), _features(2, 5, 18)
    theirs = reference(torch.tensor(x)).detach().numpy()
    sources = [gather(f, windows(1, 5, 1)) for f in np.split(x, 3, -1)]
    close(flat(run(module, *zip(*sources, strict=True))), theirs, TOLERANCE)


def test_internvl_against_transformers():
    config = InternVLConfig(vision_config=_vit(), text_config=TEXT)
    reference, weights = _reference(InternVLMultiModalProjector(config))
    cfg = MLPConfig(window=2, norm="layer")
    module, x = _load_mlp(cfg, (6,), "internvl_transformers", weights), _features(2, 4, 6, 6)
    x, mask = gather(x.reshape(2, 24, 6), windows(4, 6, 2))
    theirs = reference(torch.tensor(np.asarray(x).reshape(2, 6, 24))).detach().numpy()
    close(flat(run(module, (x,), (mask,))), theirs, TOLERANCE)


def test_perceiver_against_transformers():
    sizes = dict(resampler_n_latents=3, resampler_depth=2, resampler_n_heads=4)
    perceiver = dict(hidden_size=OUT, resampler_head_dim=6, num_key_value_heads=2, **sizes)
    config = Idefics2Config(
        vision_config=_vit(),
        text_config=TEXT | dict(model_type="mistral"),
        perceiver_config=perceiver,
    )
    config.perceiver_config._attn_implementation = "eager"
    reference, weights = _reference(Idefics2Connector(config))
    cfg = PerceiverConfig(3, 2, 4, 2, 6, hidden=12)
    module = load(tables.abstract("perceiver", cfg, (6,), OUT), "idefics2", weights)
    x, (_, mask) = _features(2, 7, 6), gather(_features(2, 7, 6), whole(7))
    mask = np.asarray(mask) & (np.arange(7) < np.array([7, 4])[:, None, None])
    theirs = reference(torch.tensor(x), torch.tensor(mask[:, 0])).detach().numpy()
    close(run(module, (x[:, None],), (mask,))[:, 0], theirs, TOLERANCE)
