"""The `millrace` command: `up`, `stop`, `worker`, `keys`, `nodes`, `jobs`, `settings`; `millrace COMMAND --help`.

Reads the environment, and `.env` in the current folder under it, once; everything below is handed its settings.
"""

import argparse
import asyncio
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from bus.link import LinkError
from bus.log import set_up_logging
from bus.process.exits import StartError
from bus.settings import EngineKind, Settings, SettingsError, read_settings
from millrace.inspect import run_jobs, run_nodes
from millrace.keys import run_keys
from millrace.preflight import CannotStart, merged_environ
from millrace.settings_table import settings_markdown, settings_text
from millrace.stop import run_stop
from millrace.up import run_up
from millrace.worker import run_worker

Command = Callable[[argparse.Namespace, dict[str, str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 fine, 1 it could not be done (one line on stderr says why), 2 wrong usage."""
    options = _parser().parse_args(arguments)
    command: Command = options.run
    try:
        return command(options, merged_environ(os.environ, Path.cwd()))
    except (CannotStart, StartError, SettingsError, LinkError) as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `millrace jobs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _up(options: argparse.Namespace, environ: dict[str, str]) -> int:
    settings = Settings.from_env(environ)
    set_up_logging("millrace", level=settings.log_level, as_json=settings.log_json)
    return asyncio.run(run_up(settings, environ, Path.cwd(), Path(options.procfile)))


def _stop(options: argparse.Namespace, environ: dict[str, str]) -> int:
    return run_stop(Path(Settings.from_env(environ).var_dir), options.timeout)


def _worker(options: argparse.Namespace, environ: dict[str, str]) -> int:
    chosen = {name: value for name, value in (("engine", options.engine), ("node_id", options.node_id)) if value}
    return run_worker(read_settings(environ).changed(**chosen), environ)


def _keys(options: argparse.Namespace, environ: dict[str, str]) -> int:
    return asyncio.run(run_keys(read_settings(environ), options))


def _nodes(options: argparse.Namespace, environ: dict[str, str]) -> int:
    return asyncio.run(run_nodes(read_settings(environ), as_json=options.json))


def _jobs(options: argparse.Namespace, environ: dict[str, str]) -> int:
    return asyncio.run(run_jobs(read_settings(environ), options.job, as_json=options.json))


def _settings(options: argparse.Namespace, environ: dict[str, str]) -> int:
    print(settings_markdown() if options.markdown else settings_text(Settings.from_env(environ)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("millrace", description="Chat serving over Redis Streams.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="start the whole fleet of this machine; Ctrl-C stops it")
    up.add_argument("--procfile", default="Procfile", help="which roles to run (default: %(default)s)")
    up.set_defaults(run=_up)

    stop = commands.add_parser("stop", help="stop the fleet that runs from this folder")
    stop.add_argument("--timeout", type=float, default=40.0, help="seconds to wait (default: %(default)s)")
    stop.set_defaults(run=_stop)

    worker = commands.add_parser("worker", help="add one more worker to the running fleet, or to REDIS_URL")
    worker.add_argument("--engine", choices=typing.get_args(EngineKind), help="default: MILLRACE_ENGINE")
    worker.add_argument("--node-id", help="default: host name, engine and a free number")
    worker.set_defaults(run=_worker)

    keys = commands.add_parser("keys", help="create, list and revoke API keys")
    actions = keys.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    create = actions.add_parser("create", help="make a key; it is shown once")
    create.add_argument("--scope", action="append", required=True, choices=["chat", "node", "admin"])
    create.add_argument("--user", default="", help="whom it belongs to")
    create.add_argument("--jobs-max", type=int, default=0, help="jobs waiting or running at once; 0: no limit")
    create.add_argument("--rate", type=int, default=0, help="requests a minute; 0: no limit")
    revoke = actions.add_parser("revoke", help="make a key invalid")
    revoke.add_argument("id", help="as `keys list` shows it")
    for action in (create, actions.add_parser("list", help="all keys, without the keys themselves"), revoke):
        action.add_argument("--json", action="store_true", help="for scripts")
    keys.set_defaults(run=_keys)

    nodes = commands.add_parser("nodes", help="all registered nodes")
    nodes.add_argument("--json", action="store_true", help="for scripts")
    nodes.set_defaults(run=_nodes)

    jobs = commands.add_parser("jobs", help="waiting and running jobs, or one job with everything about it")
    jobs.add_argument("job", nargs="?", help="a job id")
    jobs.add_argument("--json", action="store_true", help="for scripts")
    jobs.set_defaults(run=_jobs)
    settings = commands.add_parser("settings", help="all settings, with what is set now")
    settings.add_argument("--markdown", action="store_true", help="as the table of README.md")
    settings.set_defaults(run=_settings)
    return parser


if __name__ == "__main__":
    sys.exit(main())
