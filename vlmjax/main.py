"""The command line: python -m vlmjax.main COMMAND [flags].

train     --config --workdir                      trains a config, resuming what is there; exit code
                                                  75 when a SIGTERM ended it before its last step
inspect   --config                                prints the parameters of a config
aot       --config --topology [--json]            plans memory and time on a TPU slice not owned
eval      --config --workdir --output             scores a run on held-out data and writes a report
export    --workdir --output [--config --format]  writes a Hugging Face directory
generate  --model --prompt [--image] [--video]    answers a question
data pack     --source --output [--media_root]    writes a source as one ArrayRecord file
data inspect  --config [--source] [--output]      says what is in a config's data; contact sheet
data index    --config [--workers] [--kept]       measures the records of a config's data
data plan     --config                            says what a plan makes of them
"""

import json
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from vlmjax.aot import cli as aot_cli
from vlmjax.data import cli as data_cli
from vlmjax.generate import cli

config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:key=value,...]", lock_config=True)
flags.DEFINE_string("workdir", None, "folder of the run")
flags.DEFINE_string(
    "output", None, "folder that eval, export or data inspect writes, file of data pack"
)
flags.DEFINE_string("export", None, "Hugging Face folder named in eval's report; default OUTPUT/hf")
flags.DEFINE_enum(
    "format",
    None,
    ["transformers", "remote"],
    "export: for a class of transformers, or with our own code beside the weights; default: the "
    "first where one fits",
)
flags.DEFINE_bool("tensorboard", False, "also write TensorBoard events (tensorboard extra)")
flags.DEFINE_string(
    "profile", None, "train: FIRST:LAST step to trace into WORKDIR/profile, for xprof"
)
flags.DEFINE_bool("distributed", False, "train: look for the other hosts of a Cloud TPU slice")
for kind, name, default, text in cli.FLAGS:
    getattr(flags, f"DEFINE_{kind}")(name, default, f"generate: {text}")
for kind, name, default, text in aot_cli.FLAGS:
    getattr(flags, f"DEFINE_{kind}")(name, default, f"aot: {text}")
for kind, name, default, text in data_cli.FLAGS:
    getattr(flags, f"DEFINE_{kind}")(name, default, f"data: {text}")
FLAGS = flags.FLAGS
STOPPED = 75  # EX_TEMPFAIL: a scheduler must start the same command again


def train():
    """Trains the config in --workdir, resuming what is there."""
    import jax

    from vlmjax.train import cluster, loop, profile

    steps = profile.parse(FLAGS.profile)
    cluster.join(FLAGS.distributed)
    with cluster.leave_on_error():
        summary = loop.train(FLAGS.config, FLAGS.workdir, FLAGS.tensorboard, steps)
    if jax.process_index() == 0:
        print(json.dumps(summary))
    if summary.get("steps", 0) < FLAGS.config.train.steps:
        sys.exit(STOPPED)


def inspect():
    """Prints the parameters of a config: how many, trained or frozen, learning rates, bytes."""
    from vlmjax import build
    from vlmjax.train.parameters import parameter_table

    print(parameter_table(build.resolve(FLAGS.config)))


def aot():
    """Plans a train step on --topology; exit code 3 when it does not fit."""
    given = {name: FLAGS[name].value for _, name, _, _ in aot_cli.FLAGS}
    file = config_flags.get_config_filename(FLAGS["config"])
    sys.exit(aot_cli.run(FLAGS.config, file, sys.argv, given))


def evaluate():
    """Scores the newest checkpoint of --workdir on held-out data; writes a report in --output."""
    from vlmjax.evals import demo, loss

    where = FLAGS.config, FLAGS.workdir, FLAGS.output
    if demo.is_demo(FLAGS.config):
        demo.run(*where, FLAGS.export)
    else:
        loss.run(*where)


def export():
    """Writes the newest checkpoint of --workdir as a Hugging Face directory to --output."""
    from vlmjax.generate.chat import Chat

    chat = Chat.from_run(FLAGS.workdir, FLAGS.config)
    print(chat.save_pretrained(FLAGS.output, format=FLAGS.format))


def generate():
    """Prints the answer of --model to --prompt about --image and --video files."""
    print(cli.run(**{name: FLAGS[name].value for _, name, _, _ in cli.FLAGS}))


def data_pack():
    """Writes --source as one ArrayRecord file, --output, media included."""
    print(data_cli.pack(FLAGS.source, FLAGS.media_root, FLAGS.output))


def data_inspect():
    """Prints what is in the sources of a config, or in --source, as its processor sees them."""
    from vlmjax import build

    config = FLAGS.config
    if FLAGS.source:
        config.data.sources = ((FLAGS.source, 1.0),)
    if FLAGS.media_root:
        config.data.media_root = FLAGS.media_root
    data = build.open_data(build.resolve(config))
    print(data_cli.inspect(data, FLAGS.samples, FLAGS.output))


def data_index():
    """Measures the records of all sources of a config that its length indices do not have yet."""
    from vlmjax import build

    run = build.resolve(FLAGS.config)
    budget = build.make_budgets(run)[0]
    print(data_cli.index(build.open_data(run), budget, FLAGS.workers, FLAGS.kept))


def data_plan():
    """Prints what a plan of the config makes of its sources: steps, fill, imbalance, shares."""
    from vlmjax import build

    run = build.resolve(FLAGS.config)
    print(data_cli.plan(build.open_data(run), build.make_budgets(run), run.train.rows))


# Name, of one or two words -> (function, flags it needs).
COMMANDS = {
    "train": (train, ("config", "workdir")),
    "inspect": (inspect, ("config",)),
    "aot": (aot, ("config", "topology")),
    "eval": (evaluate, ("config", "workdir", "output")),
    "export": (export, ("workdir", "output")),
    "generate": (generate, ("model",)),
    "data pack": (data_pack, ("source", "output")),
    "data inspect": (data_inspect, ("config",)),
    "data index": (data_index, ("config",)),
    "data plan": (data_plan, ("config",)),
}


def main(argv):
    name = " ".join(argv[1:])
    if name not in COMMANDS:
        raise app.UsageError(f"expected one command of {sorted(COMMANDS)}, got {argv[1:]}")
    command, needed = COMMANDS[name]
    missing = [f"--{name}" for name in needed if FLAGS[name].value is None]
    if missing:
        raise app.UsageError(f"{name} needs {' '.join(missing)}")
    logging.set_verbosity(logging.WARNING)  # orbax tells every file it touches
    command()


if __name__ == "__main__":
    app.run(main)
