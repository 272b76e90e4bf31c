"""What a plan assumes about the data, of which a compiled step knows only the budgets."""

import dataclasses

from vlmjax.data.pack import Stats


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows without padding, cut into segments of one length.

    Attributes:
      patch_segment: patches of an image or frame.
      token_segment: tokens of a sample.
      supervised: share of the tokens that have a loss.
    """

    patch_segment: int
    token_segment: int
    supervised: float


def mixture(run, budget, supervised):
    """Returns the `Mixture` of a run: the segments that its kernels' cost estimates assume too."""
    compute = run.model.compute
    if not 0 < supervised <= 1:
        raise ValueError(f"--supervised={supervised} must be a share of the tokens, in (0, 1]")
    return Mixture(
        patch_segment=compute.vision_segment or max(budget.patches),
        token_segment=compute.llm_segment or budget.tokens,
        supervised=supervised,
    )


def stats(mix, rows, budget, form):
    """Returns the `Stats` of a batch, for `train.flops`.

    Args:
      mix: a `Mixture`.
      rows: B.
      budget: a `Budget`.
      form: the `batch.Form` of the model.
    """
    tokens, patches = rows * budget.tokens, tuple(rows * n for n in budget.patches)
    units, visual = tuple(rows * n for n in budget.visual), rows * form.visual(budget)
    counts = dict(
        samples=tokens // mix.token_segment,
        tokens=tokens,
        supervised=round(tokens * mix.supervised),
        patches=patches,
        units=units,
        features=tuple(u * g for u, g in zip(units, budget.group, strict=True)),
        visual=visual,
        visual_before_pruning=visual,
        routed=rows * budget.routed,
        token_pairs=tokens * mix.token_segment,
        patch_pairs=tuple(rows * n * min(mix.patch_segment, n) for n in budget.patches),
    )
    return Stats(**{f.name: counts.get(f.name, 1) for f in dataclasses.fields(Stats)})


def loop_trips(mix, run, budget, mesh):
    """Returns {part: trips} of the loops whose trip count is data, on one chip of the mesh."""
    chunk, slots = run.model.compute.loss_chunk, mesh.shape["seq"] * mesh.shape["tensor"]
    if budget.tokens % slots:  # as `sharding.map_tokens` shares them out
        slots = mesh.shape["seq"]
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * slots * run.train.accumulate
    supervised = run.train.rows * budget.tokens / shards * mix.supervised
    return {"loss": -(-supervised // chunk)} if chunk else {}
