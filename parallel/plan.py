"""python -m parallel.plan TASK|alexnet|resnet50|gpt: how should so many ranks share this network's training?

To be run, not imported: in Python `parallel.plan` is the planner's function, whose name an import of this module would take.
"""

import sys

from hessian.command_line import reserve_stdout
from parallel.plan_command import run
from parallel.plan_options import parse

if __name__ == "__main__":
    parsed = parse()
    sys.exit(run(parsed, reserve_stdout()))
