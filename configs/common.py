"""What configs share. Imports nothing of the library."""


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
