"""ConvNeXt (arXiv:2201.03545), all of its stages on one grid, as in Cambrian-1 (arXiv:2406.16860).

Channels last. Patches come packed as for the ViT, in reading order, and every image has the same
size; the stem and the convolutions between stages take windows that do not overlap and are products
with a matrix. Sources: timm `convnext.py`, cambrian `clip_convnext_encoder.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vlmjax.batch import TowerForm
from vlmjax.nn import MLP, Dense, LayerNorm, Scale, param, scan_layers, stack
from vlmjax.sharding import layout_of, map_slots
from vlmjax.vision.pixels import CLIP, normalise


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    """A ConvNeXt.

    Attributes:
      widths, depths: channels and blocks of each stage; each halves the grid of the one before.
      rows, columns: of patches in an image.
      grid: side of the grid that the features of all stages are resized to (bilinear).
      patch: pixels on a side of a patch, which is the stem.
      kernel: side of the depthwise convolution.
      ratio: of the width of an MLP to that of its stage.
      eps: of every norm; 1e-5 in the XXL model of open_clip, 1e-6 elsewhere.
      layer_scale: initial scale of the branch of a block.
      mean, std: of the pixels of each channel, between 0 and 1.
    """

    widths: tuple
    depths: tuple
    rows: int
    columns: int
    grid: int
    patch: int = 4
    kernel: int = 7
    ratio: int = 4
    act: str = "gelu"
    eps: float = 1e-6
    layer_scale: float = 1e-6
    mean: tuple = CLIP["mean"]
    std: tuple = CLIP["std"]

    prefix = 0  # slots in front of a view

    def __post_init__(self):
        halved = 2 ** (len(self.widths) - 1)
        if len(self.depths) != len(self.widths) or self.rows % halved or self.columns % halved:
            raise ValueError(
                f"vision widths={self.widths}, depths={self.depths}, rows={self.rows}, "
                f"columns={self.columns} do not fit: each stage needs a width and a depth, and "
                f"rows and columns must be multiples of {halved}, being halved between stages"
            )

    @property
    def patch_dim(self):
        """Values in a patch row."""
        return 3 * self.patch**2

    @property
    def form(self):
        """What the host knows of it."""
        return TowerForm(self.patch, out=(self.grid, self.grid))

    @property
    def out_width(self):
        """Channels of a feature."""
        return sum(self.widths)

    def out_grid(self, rows, columns):
        """Returns the rows and columns of the output slots of a view of such patches."""
        if (rows, columns) != (self.rows, self.columns):
            raise ValueError(
                f"a view of {rows} x {columns} patches was given; this ConvNeXt takes "
                f"{self.rows} x {self.columns}; resize the view or change rows and columns"
            )
        return self.grid, self.grid


PRESETS = {
    "convnext_xxl": dict(
        CLIP,
        widths=(384, 768, 1536, 3072),
        depths=(3, 4, 30, 3),
        rows=256,  # 1024 pixels
        columns=256,
        grid=96,
        eps=1e-5,
    ),
}


class DepthwiseConv(nnx.Module):
    """Convolution of each channel with its own kernel f32[k, k, 1, D], the same size out."""

    def __init__(self, size, width, *, rngs):
        axes = (None, None, None, "embed")
        self.kernel = param(rngs, (size, size, 1, width), axes, fan_in=size**2)
        self.bias = param(rngs, (width,), ("embed",), "zeros")

    def __call__(self, x, layout):
        """Returns [B, I, h, w, D]."""

        def convolve(x, kernel):
            return jax.lax.conv_general_dilated(
                x.reshape(-1, *x.shape[2:]),
                kernel.astype(x.dtype),  # here, so that devices add their gradients up in f32
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=x.shape[-1],
            ).reshape(x.shape)

        # By hand: where B and I are both spread, XLA (jax 0.10.2) adds the gradient of the kernel
        # up several times.
        y = map_slots(convolve, x, self.kernel[...], layout=layout)
        return (y + self.bias[...]).astype(x.dtype)


class Block(nnx.Module):
    """x + scale(mlp(norm(conv(x))))."""

    def __init__(self, cfg, width, *, rngs):
        self.conv = DepthwiseConv(cfg.kernel, width, rngs=rngs)
        self.norm = LayerNorm(width, cfg.eps, rngs=rngs)
        self.mlp = MLP(width, cfg.ratio * width, cfg.act, gated=False, bias=True, rngs=rngs)
        self.layer_scale = Scale(width, cfg.layer_scale, rngs=rngs)

    def __call__(self, x, layout):
        return x + self.layer_scale(self.mlp(self.norm(self.conv(x, layout))))


class Stage(nnx.Module):
    """A halved grid (but in the first stage), then equal blocks."""

    def __init__(self, cfg, i, *, rngs):
        before = cfg.widths[i - 1]
        shape = (4 * before,), (cfg.widths[i],), ("patch",), ("embed",)
        self.down_norm = LayerNorm(before, cfg.eps, rngs=rngs) if i else None
        self.down = Dense(*shape, rngs=rngs) if i else None
        make = lambda rngs: Block(cfg, cfg.widths[i], rngs=rngs)  # noqa: E731
        self.blocks = stack(make, cfg.depths[i], rngs=rngs)

    def __call__(self, x, layout, remat):
        """Returns [B, I, h, w, D] of [B, I, h, w, D], or of twice the rows and columns."""
        if self.down is not None:
            B, I, h, w, D = x.shape
            windows = self.down_norm(x).reshape(B, I, h // 2, 2, w // 2, 2, D)
            windows = windows.transpose(0, 1, 2, 4, 3, 5, 6)
            x = self.down(windows.reshape(B, I, h // 2, w // 2, 4 * D))

        def layer(block, x, _):
            return layout.constrain(block(x, layout)), None

        return scan_layers(self.blocks, layer, layout.constrain(x), remat=remat)[0]


class ConvNeXt(nnx.Module):
    """Stem and stages under `stem`, `stem_norm`, `stage_0`, `stage_1`, ..."""

    def __init__(self, cfg, *, rngs):
        self.cfg, first = cfg, cfg.widths[0]
        self.stem = Dense((cfg.patch_dim,), (first,), ("patch",), ("embed",), rngs=rngs)
        self.stem_norm = LayerNorm(first, cfg.eps, rngs=rngs)
        for i in range(len(cfg.widths)):
            setattr(self, f"stage_{i}", Stage(cfg, i, rngs=rngs))

    def __call__(self, patches, *, dtype=jnp.float32, attention=None, remat="none"):
        """Returns [B, I * grid * grid, sum of widths], in reading order, the first stage first.

        Args:
          patches: a `batch.Patches` whose slots are I images of rows * columns patches each, in
            reading order. Segments and coordinates say nothing new and are not read; images of
            padding come out arbitrary.
          dtype: of the computation; features are resized in f32.
          attention: not used.
          remat: a key of `nn.REMAT`.
        """
        cfg, pixels = self.cfg, patches.pixels
        B, P = pixels.shape[:2]
        if P % (cfg.rows * cfg.columns):
            raise ValueError(
                f"{P} patch slots are not a whole number of images of {cfg.rows} x {cfg.columns} "
                "patches; change data.budget"
            )
        stages = self.stages(patches, dtype=dtype, remat=remat)
        shape = (*stages[0].shape[:2], cfg.grid, cfg.grid)
        resized = [
            jax.image.resize(
                x.astype(jnp.float32), (*shape, x.shape[-1]), "bilinear", antialias=False
            )
            for x in stages
        ]
        return jnp.concatenate(resized, -1).astype(dtype).reshape(B, -1, cfg.out_width)

    def stages(self, patches, *, dtype=jnp.float32, remat="none"):
        """Returns what leaves each stage, a list of [B, I, h, w, D]."""
        cfg = self.cfg
        B, P, values = patches.pixels.shape
        images = P // (cfg.rows * cfg.columns)
        layout, outputs = layout_of("vision", B, images, "whole"), []
        pixels = normalise(patches.pixels, cfg.mean, cfg.std).astype(dtype)
        x = self.stem_norm(self.stem(pixels.reshape(B, images, cfg.rows, cfg.columns, values)))
        for i in range(len(cfg.widths)):
            x = getattr(self, f"stage_{i}")(x, layout, remat)
            outputs.append(x)
        return outputs
