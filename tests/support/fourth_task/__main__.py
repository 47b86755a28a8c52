"""Run a launch file or a module with the fourth task: `python -m tests.support.fourth_task launch/train.py ...`."""

import runpy
import sys

import tests.support.fourth_task  # noqa: F401, it registers the task

if __name__ == "__main__":
    # DeepSpeed's launcher puts --local_rank before everything.
    target = next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    sys.argv.remove(target)
    sys.argv[0] = target
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
