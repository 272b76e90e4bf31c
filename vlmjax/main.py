"""The command line: python -m vlmjax.main COMMAND [flags].

train     --config --workdir                    trains a config, resuming what is there
inspect   --config                              prints the parameters of a config
eval      --config --workdir --output           scores a run on held-out data and writes a report
export    --workdir --output [--config]         writes a Hugging Face directory
generate  --model --prompt [--image] [--video]  answers a question
"""

import json

from absl import app, flags, logging
from ml_collections import config_flags

from vlmjax.generate import cli

config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:key=value,...]", lock_config=True)
flags.DEFINE_string("workdir", None, "folder of the run")
flags.DEFINE_string("output", None, "folder that eval or export writes")
flags.DEFINE_string("export", None, "Hugging Face folder named in eval's report; default OUTPUT/hf")
flags.DEFINE_bool("tensorboard", False, "also write TensorBoard events (tensorboard extra)")
for kind, name, default, text in cli.FLAGS:
    getattr(flags, f"DEFINE_{kind}")(name, default, f"generate: {text}")
FLAGS = flags.FLAGS


def train():
    """Trains the config in --workdir, resuming what is there."""
    from vlmjax.train.loop import train

    print(json.dumps(train(FLAGS.config, FLAGS.workdir, FLAGS.tensorboard)))


def inspect():
    """Prints the parameters of a config: how many, trained or frozen, learning rates, bytes."""
    from vlmjax import build
    from vlmjax.train.parameters import parameter_table

    print(parameter_table(build.resolve(FLAGS.config)))


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

    print(Chat.from_run(FLAGS.workdir, FLAGS.config).save_pretrained(FLAGS.output))


def generate():
    """Prints the answer of --model to --prompt about --image and --video files."""
    print(cli.run(**{name: FLAGS[name].value for _, name, _, _ in cli.FLAGS}))


# Name -> (function, flags it needs).
COMMANDS = {
    "train": (train, ("config", "workdir")),
    "inspect": (inspect, ("config",)),
    "eval": (evaluate, ("config", "workdir", "output")),
    "export": (export, ("workdir", "output")),
    "generate": (generate, ("model",)),
}


def main(argv):
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise app.UsageError(f"expected one command of {sorted(COMMANDS)}, got {argv[1:]}")
    command, needed = COMMANDS[argv[1]]
    missing = [f"--{name}" for name in needed if FLAGS[name].value is None]
    if missing:
        raise app.UsageError(f"{argv[1]} needs {' '.join(missing)}")
    logging.set_verbosity(logging.WARNING)  # orbax tells every file it touches
    command()


if __name__ == "__main__":
    app.run(main)
