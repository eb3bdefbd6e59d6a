"""Runs a script in a process that a fork server started: what such a process does not come with is set here.

`conftest.Processes` puts `script`, `arguments`, `environment` and `log` among the globals.
"""

import gc
import os
import runpy
import sys

os.setpgid(0, 0)  # so that what it leaves, such as a loader's workers, can be found
gc.freeze()  # what the server has imported is no garbage
os.environ.update(globals()["environment"])
sys.argv = [globals()["script"], *globals()["arguments"]]
output = os.open(globals()["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for stream in (1, 2):
    os.dup2(output, stream)
runpy.run_path(globals()["script"], run_name="__main__")
