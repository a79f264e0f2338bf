"""`python -m dispatcher`: one dispatcher under its restarting parent. Run as many as you like."""

import os
import sys

from bus.process.parent import Role, run_role

if __name__ == "__main__":
    sys.exit(run_role(Role("dispatcher", child="dispatcher.service:run"), sys.argv[1:], os.environ))
