"""The command line: python -m vlmjax.main COMMAND [flags]."""

import json

from absl import app, flags, logging
from ml_collections import config_flags

config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:key=value,...]", lock_config=True)
flags.DEFINE_string("workdir", None, "folder of the run")
flags.DEFINE_bool("tensorboard", False, "also write TensorBoard events (needs the tensorboard extra)")
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


COMMANDS = {"train": (train, ("config", "workdir")), "inspect": (inspect, ("config",))}


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
