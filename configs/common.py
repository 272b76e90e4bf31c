"""What configs share. Imports nothing of the library."""

# Slices by their Cloud names (of a v5p half the number are chips), and hosts of GPUs: how a run is
# spread over them and what its backward pass may keep of the decoder and of the vision tower.
# Planned with `aot`: 2B fits the first two and v5p-32, 7B fits v5p-64 and v6e-256; for GPUs nothing
# was planned. Rows are independent, so they are what is spread first; where there are more chips
# than rows, seq shares out a row.
SLICES = {
    "v5e-16": dict(mesh=dict(fsdp=16), remat="attention", vision_remat="attention"),
    "v6e-16": dict(mesh=dict(fsdp=16), remat="attention", vision_remat="attention"),
    "v6e-256": dict(mesh=dict(fsdp=64, seq=4), remat="dots", vision_remat="attention"),
    "v5p-32": dict(mesh=dict(fsdp=16), remat="dots", vision_remat="dots"),
    "v5p-64": dict(mesh=dict(fsdp=32), remat="dots", vision_remat="dots"),
    "h200-1": dict(mesh=dict(), remat="dots", vision_remat="dots"),
    "h200-8": dict(mesh=dict(fsdp=8), remat="dots", vision_remat="dots"),
}


def slice_preset(name, rows):
    """Returns (mesh, compute, accumulate) for `rows` rows a step.

    `mesh` has every axis, `compute` the remat policies, and each shard takes a row at a time.

    Raises:
      ValueError: an unknown slice.
    """
    if name not in SLICES:
        raise ValueError(
            f"slice={name!r} is none of {sorted(SLICES)}; for another, start from one of them and "
            "change --config.mesh, --config.train.accumulate and --config.model.compute.remat"
        )
    preset = dict(SLICES[name])
    mesh = dict(data=1, fsdp=1, seq=1, tensor=1) | preset.pop("mesh")
    return mesh, preset, max(rows // (mesh["data"] * mesh["fsdp"]), 1)


def parse_arg(arg, **defaults):
    """Returns a dict of `defaults` updated from "key=value,key=value", typed as the defaults.

    Raises:
      ValueError: an unknown key, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            raise ValueError(f"config argument {key!r} is unknown; allowed are {sorted(defaults)}")
        kind = type(defaults[key])
        if kind is bool:
            if text not in ("True", "true", "1", "", "False", "false", "0"):
                raise ValueError(f"config argument {key}={text!r} must be true or false")
            values[key] = text in ("True", "true", "1", "")
        else:
            try:
                values[key] = kind(text)
            except ValueError as e:
                raise ValueError(f"config argument {key}={text!r} must be a {kind.__name__}") from e
    return values
