"""`python -m helpers.fork_server`: run code in forks of this process, which has imported PyTorch and nothing else.

Each line of standard input is a request in JSON: code, arguments, environment, folder, and the files for what it prints.
The answer is the exit status on a line, -N for signal N. A fork does what `python -c CODE ARGUMENTS` does.
"""

import atexit
import json
import os
import sys
import traceback
import types
from typing import NoReturn

import torch.export  # noqa: F401


def become(request: dict) -> None:
    """Take on the environment, folder, arguments and files of a request."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for descriptor, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv, sys.path[0] = ["-c", *request["arguments"]], ""


def run(code: str) -> NoReturn:
    """Run code as the main module, and exit without tearing down the server's imports, which takes longer."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    if (child := os.fork()) == 0:
        become(request := json.loads(line))
        run(request["code"])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
