"""A stand-in for the process of a run, forked from this one: importing everything again takes longer than a run."""

import multiprocessing
import os
import runpy
import sys
import traceback


def _main(command, stdout, env):
    os.dup2(stdout.fileno(), 1)
    os.dup2(stdout.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(env)
    sys.argv = command[command.index("-m") + 1 :]
    status = 1
    try:
        runpy.run_module(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class ForkedProcess:
    """What `compare` uses of `subprocess.Popen`."""

    def __init__(self, command, *, stdout, stderr=None, env=None):
        self._process = multiprocessing.get_context("fork").Process(target=_main, args=(command, stdout, env or {}))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def terminate(self):
        self._process.terminate()

    def kill(self):
        self._process.kill()
