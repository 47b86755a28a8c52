"""Run a script under a time limit that prints the stack of every thread and ends the process."""

import faulthandler
import os
import runpy
import sys

faulthandler.dump_traceback_later(float(os.environ["TEST_TIMEOUT_SECONDS"]), exit=True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
