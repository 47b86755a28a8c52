"""Run a launch file or a module with the fourth task: `python -m tests.support.fourth_task launch/train.py ...`."""

import runpy
import sys

import tests.support.fourth_task  # noqa: F401, it registers the task

if __name__ == "__main__":
    del sys.argv[0]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
