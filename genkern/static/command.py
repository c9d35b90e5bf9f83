"""`genkern static`: the report."""

import json
import sys


def add_static_parser(commands):
    parser = commands.add_parser(
        "static",
        help="what the GPU kernels compile to, without a GPU: registers, instructions, bytes",
    )
    parser.add_argument("op", nargs="?", default="", help="only ops whose name begins so")
    parser.add_argument("--targets", metavar="sm_80,…", help="only these (default: all)")
    parser.add_argument(
        "--sources", metavar="DIR", help="genkern's csrc folder (default: the one beside it)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the facts there too")
    parser.set_defaults(func=run)


def run(args):
    from genkern.static.cubins import TARGETS
    from genkern.static.gather import gather
    from genkern.static.render import render

    targets = args.targets.split(",") if args.targets else TARGETS
    facts = gather(args.op, targets, args.sources, say=_say)
    print(render(facts))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(facts, file, indent=1)
    return 0


def _say(part):
    print(f"genkern static: {part}", file=sys.stderr, flush=True)
