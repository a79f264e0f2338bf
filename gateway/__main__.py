"""`python -m gateway [--port N]`: one gateway under its restarting parent. Run as many as you like."""

import argparse
import os
import sys

from bus.process.parent import Role, run_role
from bus.settings import Settings


def configure(settings: Settings, arguments: list[str]) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m gateway", description="HTTP and SSE in front of the bus")
    parser.add_argument("--host", default=settings.gateway_host, help="address to listen on")
    parser.add_argument("--port", type=int, default=settings.gateway_port, help="port to listen on")
    flags = parser.parse_args(arguments)
    return settings.changed(gateway_host=flags.host, gateway_port=flags.port)


if __name__ == "__main__":
    role = Role("gateway", child="gateway.service:run", configure=configure)
    sys.exit(run_role(role, sys.argv[1:], os.environ))
