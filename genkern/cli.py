"""The `genkern` command: info, train, sample, bench, static, prove. Each part brings its own
arguments."""

import argparse
import sys

from genkern.bench.command import add_bench_parser
from genkern.info import add_info_parser
from genkern.prove.command import add_prove_parser
from genkern.static.command import add_static_parser
from genkern.train.commands import add_sample_parser, add_train_parser


def build_parser():
    parser = argparse.ArgumentParser(
        prog="genkern",
        description="Fused PyTorch kernels for training generative models.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        add_info_parser,
        add_train_parser,
        add_sample_parser,
        add_bench_parser,
        add_static_parser,
        add_prove_parser,
    ):
        add(commands)
    return parser


def main(argv=None):
    """Runs one command; returns its exit code. Errors that a user can mend are one sentence."""
    args = build_parser().parse_args(argv)
    try:
        return args.func(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"genkern {args.command}: {error}", file=sys.stderr)
        return 1
