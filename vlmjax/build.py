"""From a ConfigDict to the dataclasses of each module: only here configs meet the library."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from vlmjax import compatible, nn, sharding
from vlmjax.batch import Budget
from vlmjax.connectors import CONNECTORS
from vlmjax.data import held_out, mix
from vlmjax.data.mix import DataConfig
from vlmjax.data.picture import PictureConfig, Show, row_budget
from vlmjax.data.processor import Processor, ProcessorConfig, control_tokens
from vlmjax.data.sources import open_source
from vlmjax.data.tokenizer import Tokenizer
from vlmjax.llm import decoder, presets
from vlmjax.nn import flatten
from vlmjax.train.optimizer import OptimConfig
from vlmjax.vision import convnext, vit
from vlmjax.vlm import VLM, Compute, VLMConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run.

    Attributes:
      steps: optimizer steps.
      rows: packed rows of a step, over all devices and micro-batches.
      accumulate: micro-batches the rows are cut into.
      seed: of weights and data.
      log_every, save_every: steps. The last step is always saved.
      keep: checkpoints kept.
      frozen_dtype: storage of frozen parameters.
    """

    steps: int
    rows: int
    accumulate: int = 1
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep: int = 2
    frozen_dtype: str = "bfloat16"

    def __post_init__(self):
        for name in ("steps", "rows", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.rows % self.accumulate:
            raise ValueError(
                f"train.rows={self.rows} is not a multiple of train.accumulate={self.accumulate}; "
                "the rows are cut into that many equal micro-batches"
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How to evaluate, in training and by the `eval` command.

    Attributes:
      sources: specs of held-out sources ("json:FILE"), beside the records that sources of training
        hold out (`SourceConfig.held_out`). Where there is neither, `eval` takes the demo's test
        split for a config that trains on the demo, else the sources that the config trains on.
      every: steps of training between two measurements of the loss on all of these, a multiple of
        train.log_every; the last step is measured too. 0 = none. A step at which a SIGTERM ends the
        run is not, and during a measurement none is looked at.
      samples: of each demo task, or at most of each of `sources`, chosen by `seed`.
      required_samples: of each demo task that must reach a given score.
      seed: chooses the records of `sources` (of one without end: which it has) and of the demo.
      rows: prompts that are answered together.
      max_new_tokens: most tokens of an answer.
    """

    sources: tuple = ()
    every: int = 0
    samples: int = 120
    required_samples: int = 200
    seed: int = 1
    rows: int = 64
    max_new_tokens: int = 32

    def __post_init__(self):
        if isinstance(self.sources, str) or len(set(self.sources)) < len(self.sources):
            raise ValueError(
                f"eval.sources={self.sources!r} is not allowed: give a tuple of specs, each of "
                "them once, such as ('json:FILE',)"
            )
        lowest = dict(every=0, samples=2, required_samples=2, rows=1)
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"eval.{name}={getattr(self, name)} is not allowed: it must be at least "
                    f"{least}; raise it"
                )


@dataclasses.dataclass(frozen=True)
class Run:
    """A resolved config."""

    stage: int
    model: VLMConfig
    init: object  # {module: source} or the work directory of an earlier stage
    objective: str
    lr: tuple
    optim: OptimConfig
    train: TrainConfig
    data: DataConfig
    processor: ProcessorConfig
    mesh: dict
    eval: EvalConfig


def frozen(value):
    """Returns a value with tuples for all lists in it."""
    if isinstance(value, dict):
        return {key: frozen(inner) for key, inner in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def section(cls, values, name):
    """Returns cls(**values); ValueError naming unknown or missing keys of config section `name`.

    Lists, which a config read from JSON has for tuples, become tuples.
    """
    values = {key: frozen(value) for key, value in dict(values).items()}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    missing = [
        n
        for n, f in fields.items()
        if n not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        raise ValueError(
            f"config section {name!r} ({cls.__name__}):"
            + (f" unknown keys {unknown};" if unknown else "")
            + (f" missing keys {missing};" if missing else "")
            + f" allowed are {sorted(fields)}"
        )
    return cls(**values)


def preset(cls, presets, values, name):
    """Returns cls from an optional "preset" row and overrides."""
    values = dict(values)
    row = values.pop("preset", None)
    if row is not None and row not in presets:
        raise ValueError(f"{name}.preset={row!r} is unknown; choose one of {sorted(presets)}")
    return section(cls, {**presets.get(row, {}), **values}, name)


TOWERS = {
    "vit": (vit.ViTConfig, vit.PRESETS),
    "convnext": (convnext.ConvNeXtConfig, convnext.PRESETS),
}


def typed(kinds, values, name, default):
    """Returns (what `kinds` has for the "type" of a section, its other values)."""
    values = dict(values)
    kind = values.pop("type", default)
    if kind not in kinds:
        raise ValueError(f"{name}.type={kind!r} is unknown; choose one of {sorted(kinds)}")
    return kinds[kind], values


def vision_config(values, name="model.vision"):
    """Returns the config of an encoder, or of each of several in a tuple."""
    if isinstance(values, (tuple, list)):
        return tuple(vision_config(v, f"{name}[{i}]") for i, v in enumerate(values))
    kind, values = typed(TOWERS, values, name, "vit")
    return preset(*kind, values, name)


def model_config(values):
    """Returns the `VLMConfig` of a `model` section."""
    values = dict(values)
    allowed = {f.name for f in dataclasses.fields(VLMConfig)}
    if unknown := set(values) - allowed:
        raise ValueError(
            f"config section 'model': unknown keys {sorted(unknown)}; allowed are {sorted(allowed)}"
        )
    connector = None
    if values["vision"] is not None:
        name = "model.connector"
        (cls, _), chosen = typed(CONNECTORS, values.get("connector", {}), name, "mlp")
        connector = section(cls, chosen, name)
    return VLMConfig(
        vision=None if values["vision"] is None else vision_config(values["vision"]),
        connector=connector,
        llm=preset(decoder.DecoderConfig, presets.PRESETS, values["llm"], "model.llm"),
        compute=section(Compute, values.get("compute", {}), "model.compute"),
        sources=tuple(values.get("sources", ())),
        pool=values.get("pool", "none"),
    )


def resolve(config):
    """Returns the `Run` of a ConfigDict; ValueError for anything unknown or missing."""
    values = config.to_dict()
    allowed = {f.name for f in dataclasses.fields(Run)}
    unknown, missing = sorted(set(values) - allowed), sorted(allowed - set(values))
    if unknown or missing:
        raise ValueError(
            f"config: unknown keys {unknown}, missing keys {missing}; a config has "
            f"exactly {sorted(allowed)}"
        )
    model = model_config(values["model"])
    processor = section(ProcessorConfig, values["processor"], "processor")
    train = section(TrainConfig, values["train"], "train")
    evaluation = section(EvalConfig, values["eval"], "eval")
    if evaluation.every % train.log_every:
        raise ValueError(
            f"eval.every={evaluation.every} is not a multiple of train.log_every="
            f"{train.log_every}: held-out losses stand in lines of the log; change one of them"
        )
    compatible.check(model, processor.picture)
    return Run(
        stage=values["stage"],
        model=model,
        init=values["init"],
        objective=values["objective"],
        lr=tuple(tuple(row) for row in values["lr"]),
        optim=section(OptimConfig, values["optim"], "optim"),
        train=train,
        data=section(DataConfig, values["data"], "data"),
        processor=processor,
        mesh=values["mesh"],
        eval=evaluation,
    )


def abstract(cfg):
    """Returns (graphdef, {path: ShapeDtypeStruct}, {path: logical axes}); allocates nothing."""
    model = jax.eval_shape(lambda: VLM(cfg, rngs=nnx.Rngs(0)))
    graphdef, params = nn.unbind(model)
    axes = {
        "/".join(path): p.get_metadata()["axes"] for path, p in nnx.to_flat_state(nnx.state(model))
    }
    return graphdef, flatten(params), axes


def shardings(shapes, axes, mesh):
    """Returns {path: NamedSharding} of parameters on a mesh."""
    return {
        path: jax.sharding.NamedSharding(mesh, sharding.spec_of(path, axes[path], x.shape, mesh))
        for path, x in shapes.items()
    }


def random_params(cfg, seed, shardings=None):
    """Returns {path: f32 array}, drawn on the devices they belong to."""

    def draw(key):
        return flatten(nn.unbind(VLM(cfg, rngs=nnx.Rngs(key)))[1])

    return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))


def check_params(params, shapes, source):
    """Raises one ValueError that names all missing, unexpected and mis-shaped parameters."""
    problems = [f"missing {p} {shapes[p].shape}" for p in sorted(set(shapes) - set(params))]
    problems += [f"unexpected {p} {np.shape(params[p])}" for p in sorted(set(params) - set(shapes))]
    problems += [
        f"{p} is {np.shape(params[p])}, the model needs {shapes[p].shape}"
        for p in sorted(set(params) & set(shapes))
        if tuple(np.shape(params[p])) != tuple(shapes[p].shape)
    ]
    if problems:
        raise ValueError(
            f"weights of {source} do not fit the model of this config; "
            "change the one or the other:\n  " + "\n  ".join(problems)
        )


def make_tokenizer(run):
    """Returns the `Tokenizer` of a run's directory, or the demo's own for "demo".

    The demo's has no control tokens but those of its own template; what else the processor of the
    run needs comes behind all of its ids.
    """
    if run.data.tokenizer != "demo":
        return Tokenizer(run.data.tokenizer)
    tokenizer = Tokenizer(Path(__file__).parent / "data" / "demo" / "assets" / "tokenizer")
    tokenizer.add(control_tokens(run.processor))
    return tokenizer


def open_data(run):
    """Returns the `data.mix.Data` of a run: its sources, with the processor of each."""
    return mix.open_data(run.data, processors(run), run.train.seed)


def processors(run):
    """Returns function (settings that differ from those of a run, as a dict) -> `Processor`."""
    tokenizer = make_tokenizer(run)

    def make_processor(other):
        settings = dataclasses.asdict(run.processor) | other
        return Processor(section(ProcessorConfig, settings, "processor"), tokenizer, run.model.form)

    return make_processor


def open_held_out(run, data=None):
    """Returns the `data.held_out.HeldOut` of each source with held-out records.

    Args:
      run: a `Run`.
      data: of `open_data`; None = of its sources only those that hold records out are opened.

    Raises:
      ValueError: there are none, or a source is absent, or is trained on as well.
    """
    if data is None:
        pairs = zip(run.data.sources, run.data.mixed, strict=True)
        if kept := tuple(source for source, s in pairs if s.held_out):
            kept = dataclasses.replace(run.data, sources=kept)
            data = open_data(dataclasses.replace(run, data=kept))
    found = held_out.of_data(data) if data else []
    trained = {source.fingerprint for source in data.sources} if data else set()
    process = processors(run)({}) if run.eval.sources else None
    for spec in run.eval.sources:
        try:
            source = open_source(spec, run.data.media_root, run.eval.seed)
        except ValueError as error:
            raise ValueError(f"eval.sources has {spec!r}: {error}") from error
        if spec in {s.spec for s in run.data.mixed} or source.fingerprint in trained:
            raise ValueError(
                f"eval.sources has {spec!r}, which data.sources trains on: hold records of it out, "
                "dict(spec=..., weight=..., held_out=500), or name another file"
            )
        found.append(held_out.some(spec, source, process, run.eval.samples, run.eval.seed))
    if not found:
        raise ValueError(
            f"eval.every={run.eval.every} and there are no held-out records: name sources of their "
            "own in eval.sources, let a source of training hold some out, dict(spec=..., "
            "weight=..., held_out=500), or set eval.every=0"
        )
    return found


def make_budgets(run):
    """Returns the `Budget` of every bucket, that of `data.budget` first."""
    return tuple(_budget(run, values) for values in (run.data.budget, *run.data.buckets))


SLOTS = 64  # slots come in multiples of it, so that they divide over the axes of a mesh


def _budget(run, values):
    if len(values) == 4:
        return Budget(*values)
    if run.processor.picture is None:
        raise ValueError(
            f"data.budget={values} counts views, which pictures in native size have not: give "
            "(tokens, patches, visual tokens, patches of a visual token)"
        )
    show = Show(PictureConfig(**run.processor.picture), run.model.form)
    return row_budget(show, *values, multiple=SLOTS)
