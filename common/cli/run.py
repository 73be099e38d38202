"""Running a script: what its user can fix becomes one line and exit status 2."""

import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError

from common.cli.parser import Config, parse
from common.errors import UserError
from common.training import distributed


def run(main: Callable[[Config], None], config_class: type[Config]) -> NoReturn:
    """Run a script's `main` with its command line; what the user can fix becomes one line and exit status 2."""
    script, again = Path(sys.argv[0]).name, "the same command"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    distributed.hush()
    status = 2
    try:
        config = parse(config_class, description=sys.modules["__main__"].__doc__)
        if config.overwrite:
            again += " without --overwrite"
        distributed.join(getattr(config, "device", "cpu"))
        main(config)
    except UserError as error:
        reason = str(error)
    except (OSError, SafetensorError) as error:  # no permission, no space, for which safetensors has a name of its own
        place, what = getattr(error, "filename", None), getattr(error, "strerror", None)
        reason = f"{place or 'input/output'}: {what or error}; fix it or choose another --root, then run {again}"
    except KeyboardInterrupt as interrupt:
        reason, status = f"interrupted; {str(interrupt) or 'finished results are whole'}; run {again} to go on", 130
    except Exception as error:
        if distributed.launched()[1] == 1:
            raise
        if not distributed.lost(error):  # a fault of the code's: all of it is told, once
            distributed.end(traceback.format_exc(), 1)
        reason = f"another process has ended; run {again} to go on"
    else:
        distributed.part()
        sys.exit(0)
    line = f"{script}: {' '.join(reason.split())}"
    distributed.end(line.encode(errors="backslashreplace").decode(), status)  # in a path: bytes that are no UTF-8
