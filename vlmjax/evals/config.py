"""What the `eval` section of a config holds."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How to evaluate.

    Attributes:
      sources: specs of held-out sources ("json:FILE"); empty = the demo's test split for a config
        that trains on the demo, else the sources that the config trains on.
      samples: of each demo task, or of each source.
      required_samples: of each demo task that must reach a given score.
      seed: chooses the held-out records of the demo.
      rows: prompts that are answered together.
      max_new_tokens: most tokens of an answer.
    """

    sources: tuple = ()
    samples: int = 120
    required_samples: int = 200
    seed: int = 1
    rows: int = 64
    max_new_tokens: int = 32

    def __post_init__(self):
        for name, least in (("samples", 2), ("required_samples", 2), ("rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"eval.{name}={getattr(self, name)} is not allowed: it must be at least "
                    f"{least}; raise it"
                )
