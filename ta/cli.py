"""The user's door: flags in, a recipe run, and wrong input answered in two lines instead of a traceback."""

import os
import sys
from collections.abc import Callable
from typing import Any

WRONG_INPUT, NO_ROOM = 2, 3


def cli(main: Callable[[Any], None], config_class: type, argv: list[str] | None = None) -> None:
    """Parse flags into `config_class` (nested configs flattened), call `main(config)`, and exit with the code of what happened.

    Exit codes: 0 done, 2 wrong input, 3 no room or no permission, 130/143 stopped by a signal. `TA_TRACEBACK=1` shows tracebacks.
    """
    import tyro

    doc = (sys.modules[main.__module__].__doc__ or "").strip()
    config = tyro.cli(config_class, args=argv, description=doc, config=(tyro.conf.OmitArgPrefixes,))
    raise SystemExit(guard(lambda: main(config)))


def guard(action: Callable[[], Any]) -> int:
    """Run `action` and turn what a user can cause into a message and an exit code; what we caused stays a traceback."""
    if os.environ.get("TA_TRACEBACK"):
        action()
        return 0
    try:
        action()
    except ValueError as error:
        return _say(error, WRONG_INPUT)
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        return _say(error, NO_ROOM)
    except OSError as error:
        return _say(error, NO_ROOM if error.errno in (28, 122, 30) else WRONG_INPUT)
    except KeyboardInterrupt:
        return _say("stopped", 130)
    return 0


def _say(error: object, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(
        f"error: {error}" if rank == "0" else f"[rank {rank}] error: {error}",
        file=sys.stderr,
        flush=True,
    )
    return code
